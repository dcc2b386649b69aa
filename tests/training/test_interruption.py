"""A signal ends a training after a whole step and its checkpoint; the same command goes on to the same bits."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_specimens import make_trainer

from refiners.training import Callback, Trainer, TrainingInterrupted
from refiners.training.checkpoint import newest_checkpoint
from refiners.training.interruption import SIGNALS, Interruption

INTERVALS = {"save_interval": "4:step"}


class Raise(Callback):
    """Sends this process signals while a step is made, and keeps what came of it."""

    def __init__(self, number: signal.Signals, step: int, times: int = 1) -> None:
        self.number, self.step, self.times = number, step, times
        self.saved, self.evaluated = list[int](), list[int]()

    def on_log(self, trainer: Trainer, values: object) -> None:
        if trainer.clock.step == self.step - 1:  # after the check of the step before
            for _ in range(self.times):
                signal.raise_signal(self.number)

    def on_checkpoint(self, trainer: Trainer) -> None:
        self.saved.append(trainer.clock.step)

    def on_evaluate(self, trainer: Trainer) -> None:
        self.evaluated.append(trainer.clock.step)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_training_after_a_whole_step_and_it_goes_on_from_there(
    tmp_path: Path, number: signal.Signals
) -> None:
    whole, expected = make_trainer(tmp_path / "whole")
    whole.train()
    handlers = [signal.getsignal(each) for each in SIGNALS]
    trainer, losses = make_trainer(
        tmp_path / "broken", training={"evaluation_interval": "3:step"}, checkpointing=INTERVALS
    )
    callback = Raise(number, step=6)
    trainer.callbacks.append(callback)
    with pytest.raises(
        TrainingInterrupted, match=rf"stopped by {number.name} after step 6, which is saved in"
    ) as caught:
        trainer.train()
    assert caught.value.number == number and [signal.getsignal(each) for each in SIGNALS] == handlers
    assert losses.values == expected.values[:6]
    assert (callback.saved, callback.evaluated) == ([4, 6], [3])
    resumed, losses = make_trainer(tmp_path / "broken")
    resumed.train()
    assert losses.values == expected.values[6:]


def test_a_signal_in_the_last_step_does_not_hold_up_the_end(tmp_path: Path) -> None:
    trainer, losses = make_trainer(tmp_path)
    trainer.callbacks.append(Raise(signal.SIGTERM, step=10))
    trainer.train()
    assert len(losses.values) == 10


@pytest.fixture
def plain_interrupt() -> Iterator[None]:
    """Ctrl-C as it is at a terminal: shells have what they start in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("plain_interrupt")
def test_a_second_signal_acts_at_once(tmp_path: Path) -> None:
    trainer, losses = make_trainer(tmp_path)
    trainer.callbacks.append(Raise(signal.SIGINT, step=6, times=2))
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.train()
    assert not isinstance(caught.value, TrainingInterrupted) and len(losses.values) == 5


def test_outside_the_main_thread_signals_are_left_alone(tmp_path: Path) -> None:
    handlers = list[object]()

    class Look(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            handlers.append(signal.getsignal(signal.SIGINT))

    trainer, losses = make_trainer(tmp_path)
    trainer.callbacks.append(Look())
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert len(losses.values) == 10 and set(handlers) == {signal.getsignal(signal.SIGINT)}


def test_only_the_first_signal_counts() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            assert interruption.number is None
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)  # ignored, as it was before
            assert interruption.number == signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)


def start(folder: Path, model: Path, pictures: Path) -> "subprocess.Popen[str]":
    """The command, which trains a LoRA for 60 steps and writes below `folder`."""
    folder.mkdir(exist_ok=True)
    config = folder / "config.toml"
    config.write_text(
        f'recipe = "lora"\n[models]\nbase = "{model}"\n[dataset]\nfolder = "{pictures}"\n'
        '[training]\nduration = "60:step"\nbatch_size = 2\ndevice = "cpu"\n[logging]\ntensorboard = false\n'
        f'[checkpointing]\nsave_folder = "{folder}"\nsave_interval = "1000:step"\n'
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "refiners.cli", "train", str(config)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_says_that_it_was_stopped_and_goes_on_to_the_same_file(
    tmp_path: Path, model_folder: Path, picture_folder: Path, number: signal.Signals, code: int
) -> None:
    with start(tmp_path / "broken", model_folder, picture_folder) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "training from step 0 to 60\n"
        process.send_signal(number)
        (line,) = process.stderr.read().splitlines()
    assert process.returncode == code
    assert f"stopped by {number.name} after step" in line and line.endswith("the same command goes on from there")
    newest = newest_checkpoint(tmp_path / "broken" / "checkpoints")
    assert newest is not None and newest.name < "step-00000060"
    files: list[bytes] = []
    for name in ("broken", "whole"):
        with start(tmp_path / name, model_folder, picture_folder) as process:
            errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors
        files.append((tmp_path / name / "lora.safetensors").read_bytes())
    assert files[0] == files[1]
