"""What a training tells: lines, a bar, TensorBoard files; and a clear word where a library is missing."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from training_specimens import make_trainer

from refiners.training import Process, Trainer
from refiners.training.checkpoint import checkpoints
from refiners.training.config import LoggingConfig, WandbConfig
from refiners.training.reporting import (
    ProgressBar,
    ProgressLines,
    TensorBoard,
    Throughput,
    WeightsAndBiases,
    make_reporters,
    memory_gib,
)
from refiners.training.trainer import Callback


def test_only_the_first_process_reports(tmp_path: Path) -> None:
    config = make_trainer(tmp_path)[0].config.model_copy(update={"logging": LoggingConfig()})
    assert make_reporters(config, Process(rank=1, count=2)) == []
    assert [type(each) for each in make_reporters(config, Process())] == [Throughput, ProgressLines, TensorBoard]


def test_lines_tell_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _ = make_trainer(tmp_path)
    trainer.callbacks += [Throughput(), ProgressLines()]
    trainer.train()
    first, last = capsys.readouterr().err.splitlines()
    assert first == "training from step 0 to 10"
    assert last.startswith("step 10 of 10: loss ") and "0:00:00 left" in last
    assert trainer.metrics["samples_per_second"] > 0 and 0.05 < trainer.metrics["memory_gib"] < 64


def test_a_bar_ends_where_the_training_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _ = make_trainer(tmp_path)
    bar = ProgressBar()
    trainer.callbacks += [Throughput(), bar]
    trainer.train()
    (task,) = bar.bar.tasks
    assert task.completed == task.total == 10 and bar.bar.finished and "samples/s" in task.description
    capsys.readouterr()


@pytest.mark.slow
def test_numbers_and_pictures_are_in_tensorboards_files(tmp_path: Path) -> None:
    accumulators: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    class Picture(Callback):
        def on_evaluate(self, trainer: Trainer) -> None:
            for callback in trainer.callbacks:
                callback.on_images(trainer, "samples", [Image.new("RGB", (4, 4), "red")])

    trainer, losses = make_trainer(tmp_path, training={"evaluation_interval": "5:step"})
    trainer.callbacks += [TensorBoard(), Picture()]
    trainer.train()
    events = accumulators.EventAccumulator(str(tmp_path / "logs")).Reload()
    scalars = events.Scalars("train/loss")
    assert [event.step for event in scalars] == list(range(1, 11))
    torch.testing.assert_close([event.value for event in scalars], losses.values)
    assert [event.step for event in events.Images("samples/0")] == [5, 10]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_a_log_that_a_full_disk_does_not_take_is_one_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")

    class Fill(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.clock.step == 7:
                log.path = Path("/dev/full")

    trainer, losses = make_trainer(tmp_path, checkpointing={"save_interval": "5:step"})
    log = TensorBoard()
    trainer.callbacks += [log, Fill()]
    with pytest.raises(OSError, match=r"the log /dev/full could not be written \(No space left on device\)"):
        trainer.train()
    assert len(losses.values) == 7 and capfd.readouterr().err == ""
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000005"]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        WeightsAndBiases(WandbConfig(mode="offline"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.summary", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install tensorboard, or set logging\.tensorboard = false"):
        TensorBoard()


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.code = -1

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((values, step))

    def finish(self, exit_code: int) -> None:
        self.code = exit_code


def test_weights_and_biases_get_every_number_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, given = FakeRun(), list[dict[str, Any]]()

    class Library:
        @staticmethod
        def init(**arguments: Any) -> FakeRun:
            given.append(arguments)
            return run

    monkeypatch.setitem(sys.modules, "wandb", Library)  # type: ignore[arg-type]
    expected: list[float] = []
    for folder, steps in (("a", 5), ("a", 10), ("b", 10)):
        trainer, losses = make_trainer(tmp_path / folder, training={"duration": f"{steps}:step"})
        trainer.callbacks.append(WeightsAndBiases(WandbConfig(mode="offline", project="p")))
        trainer.train()
        expected += losses.values
    first = given[0]
    assert (first["project"], first["mode"], first["config"]["training"]["batch_size"]) == ("p", "offline", 4)
    assert [values["train/loss"] for values, _ in run.logged] == expected and run.code == 0
    assert given[0]["id"] == given[1]["id"] != given[2]["id"]


def test_memory_is_of_this_process() -> None:
    before = memory_gib(torch.device("cpu"))
    block = torch.ones(64 * 2**20 // 4)
    assert memory_gib(torch.device("cpu")) >= before > 0.05 and block.numel()
