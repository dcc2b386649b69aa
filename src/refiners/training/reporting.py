"""What a training tells: a progress bar or lines, TensorBoard files, Weights & Biases."""

import importlib
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from refiners.training.config import TrainerConfig, WandbConfig
from refiners.training.distributed import Process
from refiners.training.trainer import Callback, Trainer


def make_reporters(config: TrainerConfig, process: Process) -> list[Callback]:
    """The reporters that the config asks for, in the first process only."""
    if not process.is_first:
        return []
    reporters: list[Callback] = [Throughput()]
    if config.logging.progress:
        reporters.append(ProgressBar() if sys.stderr.isatty() else ProgressLines())
    if config.logging.tensorboard:
        reporters.append(TensorBoard())
    if config.wandb.mode != "disabled":
        reporters.append(WeightsAndBiases(config.wandb))
    return reporters


def note(what: str, process: Process) -> Callable[[int, int], None]:
    """A function that tells of progress in preparing data, at most once a second."""
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if process.is_first and time.monotonic() - last > 1:
            last = time.monotonic()
            print(f"{what}: {done} of {total}", file=sys.stderr)

    return show


class Throughput(Callback):
    """Adds samples per second, the time left and the memory in use to the metrics of each step."""

    def on_train_begin(self, trainer: Trainer) -> None:
        """Start the clock."""
        self.started, self.first_step = time.perf_counter(), trainer.clock.step

    def on_step_end(self, trainer: Trainer) -> None:
        """Means are over the whole run, evaluations and checkpoints included."""
        behind, ahead = trainer.clock.step - self.first_step, trainer.total_steps - trainer.clock.step
        seconds = (time.perf_counter() - self.started) / behind
        trainer.metrics["samples_per_second"] = trainer.samples_per_step / max(seconds, 1e-9)
        trainer.metrics["seconds_left"] = seconds * ahead
        trainer.metrics["memory_gib"] = memory_gib(trainer.process.device)


class ProgressBar(Callback):
    """A bar on the terminal."""

    def on_train_begin(self, trainer: Trainer) -> None:
        """Show the bar."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self.bar = Progress(*columns, refresh_per_second=4)
        self.task = self.bar.add_task("", total=trainer.total_steps, completed=trainer.clock.step)
        self.bar.start()

    def on_step_end(self, trainer: Trainer) -> None:
        """Move it on."""
        self.bar.update(self.task, completed=trainer.clock.step, description=in_words(trainer.metrics))

    def close(self, error: BaseException | None) -> None:
        """Leave the bar as it is."""
        if hasattr(self, "bar"):
            self.bar.stop()


class ProgressLines(Callback):
    """A line every ten seconds, where there is no terminal."""

    INTERVAL_S = 10

    def on_train_begin(self, trainer: Trainer) -> None:
        """Say where it starts."""
        self.last = time.monotonic()
        print(f"training from step {trainer.clock.step} to {trainer.total_steps}", file=sys.stderr)

    def on_step_end(self, trainer: Trainer) -> None:
        """Say how it goes, from time to time."""
        is_last = trainer.clock.step == trainer.total_steps
        if is_last or time.monotonic() - self.last > self.INTERVAL_S:
            self.last = time.monotonic()
            line = f"step {trainer.clock.step} of {trainer.total_steps}: {in_words(trainer.metrics)}"
            print(line, file=sys.stderr, flush=True)


class TensorBoard(Callback):
    """Writes numbers and pictures to `<save_folder>/logs`.

    Not by torch's SummaryWriter: its thread would meet a full disk with a traceback of its own.
    Raises ModuleNotFoundError if TensorBoard is not installed, OSError if the log cannot be written.
    """

    def __init__(self) -> None:
        try:
            self.summary: Any = importlib.import_module("torch.utils.tensorboard.summary")
            self.events: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
            self.records: Any = importlib.import_module("tensorboard.summary.writer.record_writer")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "logs need TensorBoard: pip install tensorboard, or set logging.tensorboard = false"
            ) from error

    def on_train_begin(self, trainer: Trainer) -> None:
        """Begin a file."""
        folder = trainer.folder / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
        # what a run that was killed logged beyond its last checkpoint is dropped
        beginning = self.events.SessionLog(status=self.events.SessionLog.START)
        self._write({"file_version": "brain.Event:2"}, {"step": trainer.clock.step + 1, "session_log": beginning})

    def on_log(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Write numbers."""
        summaries = [self.summary.scalar(name, value) for name, value in values.items()]
        self._write(*({"step": trainer.clock.step, "summary": summary} for summary in summaries))

    def on_images(self, trainer: Trainer, name: str, images: list[Image.Image]) -> None:
        """Write pictures."""
        for number, image in enumerate(images):
            summary = self.summary.image(f"{name}/{number}", np.asarray(image), dataformats="HWC")
            self._write({"step": trainer.clock.step, "summary": summary})

    def _write(self, *events: Mapping[str, Any]) -> None:
        try:
            with open(self.path, "ab") as file:
                for event in events:
                    content = self.events.Event(wall_time=time.time(), **event).SerializeToString()
                    self.records.RecordWriter(file).write(content)
        except OSError as error:
            raise OSError(error.errno, f"the log {self.path} could not be written ({error.strerror})") from error


class WeightsAndBiases(Callback):
    """Sends numbers and pictures to Weights & Biases. Raises ModuleNotFoundError if it is not installed."""

    def __init__(self, config: WandbConfig) -> None:
        self.config = config
        try:
            self.wandb: Any = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'logging to Weights & Biases needs its library: pip install wandb, or set wandb.mode = "disabled"'
            ) from error

    def on_train_begin(self, trainer: Trainer) -> None:
        """Open a run, the same one when a training is resumed."""
        known = trainer.folder / "wandb-run.txt"
        if trainer.clock.step == 0 or not known.exists():
            trainer.folder.mkdir(parents=True, exist_ok=True)
            known.write_text(secrets.token_hex(4))
        self.run = self.wandb.init(
            id=known.read_text(),
            resume="allow",
            project=self.config.project,
            entity=self.config.entity,
            mode=self.config.mode,
            dir=str(trainer.folder),
            config=trainer.config.model_dump(mode="json"),
        )

    def on_log(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Send numbers."""
        self.run.log(dict(values), step=trainer.clock.step)

    def on_images(self, trainer: Trainer, name: str, images: list[Image.Image]) -> None:
        """Send pictures."""
        self.run.log({name: [self.wandb.Image(image) for image in images]}, step=trainer.clock.step)

    def close(self, error: BaseException | None) -> None:
        """Close the run."""
        if hasattr(self, "run"):
            self.run.finish(exit_code=0 if error is None else 1)


def in_words(metrics: Mapping[str, float]) -> str:
    """The metrics of a step on one line.

    >>> in_words({"loss": 0.25, "learning_rate": 1e-4, "samples_per_second": 12, "seconds_left": 75, "memory_gib": 2})
    'loss 0.2500, rate 0.0001, 12.0 samples/s, 0:01:15 left, 2.0 GiB'
    """
    minutes, seconds = divmod(int(metrics.get("seconds_left", 0)), 60)
    return (
        f"loss {metrics['loss']:.4f}, rate {metrics['learning_rate']:.3g}, "
        f"{metrics.get('samples_per_second', 0):.1f} samples/s, "
        f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left, {metrics.get('memory_gib', 0):.1f} GiB"
    )


def memory_gib(device: torch.device) -> float:
    """The most memory that this process has used: of the GPU, or else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
