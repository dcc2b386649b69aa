"""Checkpoints are whole or not there, and a resumed run is the same run."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from training_specimens import Points, config, make_trainer, small_chain

from refiners.training import Callback, ConfigError, Trainer, checkpoint
from refiners.training.checkpoint import checkpoints, load_checkpoint, newest_checkpoint, pack, save_checkpoint, unpack

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
NESTED = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=10,
)


@given(NESTED)
@settings(deadline=None)
def test_a_nested_value_comes_back_as_it_was(value: Any) -> None:
    tensors: dict[str, Tensor] = {}
    assert unpack(json.loads(json.dumps(pack(value, "part", tensors))), tensors) == value and not tensors


def test_tensors_come_back_to_the_bit(tmp_path: Path) -> None:
    value = {
        "a": [torch.randn(3), (torch.arange(4), 0.1)],
        7: torch.tensor(1, dtype=torch.bfloat16),
        "inf": float("inf"),
    }
    path = save_checkpoint(tmp_path, 3, {"part": value, "other": {}}, keep=1)
    found = load_checkpoint(path)["part"]
    assert torch.equal(found["a"][0], value["a"][0]) and torch.equal(found["a"][1][0], value["a"][1][0])
    assert found["a"][1][1] == 0.1 and found["inf"] == float("inf") and found[7].dtype == torch.bfloat16


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"part\.x is a set, which a checkpoint cannot hold"):
        save_checkpoint(tmp_path, 1, {"part": {"x": {1}}}, keep=1)
    assert not checkpoints(tmp_path)


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10):
        save_checkpoint(tmp_path, step, {"part": step}, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000009", "step-00000010"]


def test_a_training_that_is_begun_anew_goes_on_from_its_own_checkpoints(tmp_path: Path) -> None:
    make_trainer(tmp_path, checkpointing={"save_interval": "5:step"})[0].train()
    seed = {"seed": 7, "duration": "4:step"}
    anew, losses = make_trainer(tmp_path, training=seed, checkpointing={"save_interval": "2:step", "resume": False})
    anew.train()
    assert len(losses.values) == 4
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000002", "step-00000004"]
    longer, losses = make_trainer(tmp_path, training={**seed, "duration": "6:step"})
    longer.train()
    assert len(losses.values) == 2


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = make_trainer(tmp_path, checkpointing={"save_interval": "2:step"})
    write, files = checkpoint.write_safetensors, list[Path]()

    def write_until_full(path: Path, tensors: Any) -> None:
        files.append(path)
        if len(files) > 10:
            path.write_bytes(b"half of i")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_safetensors", write_until_full)
    with pytest.raises(OSError, match=r"could not be saved \(No space left on device\); the last one that is whole is"):
        trainer.train()
    assert len(files) == 11
    left = list((tmp_path / "checkpoints").iterdir())
    assert left and all(path.name.startswith("step-") for path in left)
    monkeypatch.undo()
    again, losses = make_trainer(tmp_path, checkpointing={"save_interval": "2:step"})
    again.train()
    plain, expected = make_trainer(tmp_path / "plain")
    plain.train()
    assert 0 < len(losses.values) < 10 and losses.values == expected.values[-len(losses.values) :]


@pytest.mark.slow
def test_a_file_size_limit_leaves_nothing_behind(tmp_path: Path) -> None:
    code = (
        "import resource, signal, torch; from pathlib import Path\n"
        "from refiners.training.checkpoint import save_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "save_checkpoint(folder, 1, {'part': torch.zeros(10)}, keep=2)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "save_checkpoint(folder, 2, {'part': torch.zeros(10_000)}, keep=2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "the checkpoint of step 2 could not be saved (File too large)" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"part": torch.zeros(3)}, keep=1)
    (path / "part.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"step-00000001: this checkpoint is damaged"):
        load_checkpoint(path)


OPTIMIZERS = {
    "AdamW": {"learning_rate": 0.01},
    "SGD": {"learning_rate": 0.1, "momentum": 0.9},
    "Prodigy": {"learning_rate": 1.0},
    "AdamWScheduleFree": {"learning_rate": 0.01},
}


class Stop(Callback):
    """Ends a run after some steps, as if it were interrupted."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.clock.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_same_run(tmp_path: Path, name: str) -> None:
    pytest.importorskip({"Prodigy": "prodigyopt", "AdamWScheduleFree": "schedulefree"}.get(name, "torch"))
    sections: dict[str, Any] = {
        "training": {"duration": "20:step", "ema_decay": 0.9, "evaluation_interval": "3:step"},
        "scheduler": {"scheduler_type": "cosine", "warmup_steps": 3},
        "optimizer": {"optimizer": name, **OPTIMIZERS[name]},
        "checkpointing": {"save_interval": "4:step"},
    }
    whole, expected = make_trainer(tmp_path / "whole", **sections)
    whole.train()
    for stop in (3, 7, 15):
        broken, _ = make_trainer(tmp_path / "broken", **sections)
        broken.callbacks.append(Stop(stop))
        with pytest.raises(KeyboardInterrupt):
            broken.train()
    resumed, losses = make_trainer(tmp_path / "broken", **sections)
    resumed.train()
    assert losses.values == expected.values[12:]
    assert_same(whole, resumed)


def assert_same(one: Trainer, other: Trainer) -> None:
    assert one.ema is not None and other.ema is not None
    for name, weight in one.weights.parameters.items():
        assert torch.equal(weight, other.weights.parameters[name]), name
        assert torch.equal(one.ema.means[name], other.ema.means[name]), name
    packed, tensors = [], list[dict[str, Tensor]]()
    for trainer in (one, other):
        path = newest_checkpoint(trainer.checkpoint_folder)
        assert path is not None
        parts = load_checkpoint(path)
        for of_process in parts["randomness"]:
            del of_process["python"]  # the checker of types in tests (beartype) draws from it
        tensors.append({})
        packed.append(pack({**parts, "config": None}, "parts", tensors[-1]))
    assert packed[0] == packed[1] and list(tensors[0]) == list(tensors[1])
    assert all(map(torch.equal, tensors[0].values(), tensors[1].values()))


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    make_trainer(tmp_path)[0].train()
    again, losses = make_trainer(tmp_path)
    before = again.models["model"].Linear_1.weight.detach().clone()
    again.train()
    assert losses.values == [] and not torch.equal(again.models["model"].Linear_1.weight, before)
    longer, losses = make_trainer(tmp_path, training={"duration": "12:step"})
    longer.train()
    assert len(losses.values) == 2


def test_a_changed_config_is_told_and_can_be_allowed(tmp_path: Path) -> None:
    make_trainer(tmp_path, training={"duration": "2:step"})[0].train()
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate was 0\.01 and is 0\.02; set them back"):
        make_trainer(tmp_path, optimizer={"learning_rate": 0.02})[0].train()
    allowed, losses = make_trainer(
        tmp_path, optimizer={"learning_rate": 0.02}, checkpointing={"allow_changes": True, "keep": 5}
    )
    allowed.train()
    assert len(losses.values) == 8 and allowed.metrics["learning_rate"] == 0.02


def test_another_optimizer_goes_on_from_the_same_weights(tmp_path: Path) -> None:
    names = ["AdamW", "Prodigy", "SGD", "AdamWScheduleFree", "AdamW"]
    for module in ("prodigyopt", "schedulefree"):
        pytest.importorskip(module)
    for index, name in enumerate(names, start=1):
        optimizer = {"optimizer": name, **OPTIMIZERS[name]}
        trainer, losses = make_trainer(
            tmp_path,
            training={"duration": f"{2 * index}:step"},
            optimizer=optimizer,
            checkpointing={"allow_changes": True},
        )
        trainer.train()
        assert len(losses.values) == 2 and type(trainer.optimizer).__name__ == name


def test_rates_may_be_split_by_model_in_mid_training(tmp_path: Path) -> None:
    models = {"unet": small_chain(), "text_encoder": small_chain()}

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return (models["unet"](batch[0]) + models["text_encoder"](batch[0]) - batch[1]).square().mean()

    changes: list[tuple[int, dict[str, Any]]] = [(3, {}), (6, {"text_encoder_learning_rate": 0.001}), (9, {})]
    for steps, rates in changes:
        settings = config(
            tmp_path,
            training={"duration": f"{steps}:step"},
            optimizer={"learning_rate": 0.01, **rates},
            checkpointing={"allow_changes": True},
        )
        trainer = Trainer(models, loss, Points(), settings)
        trainer.train()
        found = {
            name: float(trainer.optimizer.state[each]["step"]) for name, each in trainer.weights.parameters.items()
        }
        assert set(found.values()) == {float(steps)} and len(found) == 8
        assert trainer.metrics.get("text_encoder_learning_rate") == rates.get("text_encoder_learning_rate")


@pytest.mark.parametrize(
    ("contents", "told"),
    [
        (None, "data was 'one' and is 'other'; set"),
        ("1 a.png|2 b.png", r"the data were 3 samples and are 2: 1 removed \(c\.png\); set"),
        ("1 a.png|4 b.png|3 c.png|5 d.png", r"3 samples and are 4: 1 added \(d\.png\), 1 changed \(b\.png\); set"),
        ("6 e|7 f|8 g|9 h", r"4: 3 removed \(a\.png, b\.png, c\.png\), 4 added \(e, f, g, …\); set"),
        ("3 c.png|2 b.png|1 a.png", "3 samples and are 3: the same ones, in another order or number; set"),
    ],
)
def test_changed_data_is_told(tmp_path: Path, contents: str | None, told: str) -> None:
    before = "1 a.png|2 b.png|3 c.png"
    for duration, data, found in (("2:step", "one", before), ("4:step", "one", before), ("6:step", "other", contents)):
        trainer, losses = make_trainer(tmp_path, training={"duration": duration})
        batches: Any = trainer.batches
        batches.fingerprint = data
        batches.contents = found.split("|") if found else ()
        if data == "other":
            with pytest.raises(ConfigError, match=told):
                trainer.train()
        else:
            trainer.train()
            assert len(losses.values) == 2


def test_other_weights_are_told(tmp_path: Path) -> None:
    make_trainer(tmp_path, training={"duration": "2:step"})[0].train()
    chain = small_chain()
    chain.Linear_1.bias.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"holds 1 weights that do not train now \(first: \['model\.Linear_1\.bias'\]\)"
    ):
        make_trainer(tmp_path, chain)[0].train()


RUN = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
import torch
from training_specimens import Callback, make_trainer

class Slow(Callback):
    def on_step_end(self, trainer):
        print(trainer.clock.step, flush=True)

torch.set_num_threads(1)
trainer, _ = make_trainer(Path(sys.argv[1]), training={{"duration": "120:step", "ema_decay": 0.9}},
                          checkpointing={{"save_interval": "3:step"}})
trainer.callbacks.append(Slow())
trainer.train()
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(tmp_path: Path) -> None:
    here, killed = str(Path(__file__).parent), tmp_path / "killed"
    run = tmp_path / "run.py"
    run.write_text(RUN.format(here=here))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(run), str(killed)]
    for step, delay in ((6, 0.0), (27, 0.003), (46, 0.01)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        while int(process.stdout.readline()) < step:
            pass
        time.sleep(delay)  # after the 6th and the 27th step, this is while a checkpoint is being saved
        process.send_signal(signal.SIGKILL)
        last = max([step, *map(int, process.stdout.read().split())])
        process.stdout.close()
        process.wait()
        newest = newest_checkpoint(killed / "checkpoints")
        assert newest is not None and last < 120
        assert int(newest.name.removeprefix("step-")) >= last - 3
        load_checkpoint(newest)
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=120)
    subprocess.run(
        [*command[:2], str(tmp_path / "whole")], check=True, env=environment, stdout=subprocess.DEVNULL, timeout=120
    )
    files = [
        path / "step-00000120" / "weights.safetensors"
        for path in (tmp_path / "whole" / "checkpoints", killed / "checkpoints")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
