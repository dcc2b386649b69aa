"""`Trainer`: the loop. It trains given parameters of any modules on any loss, and resumes exactly where it was.

    trainer = Trainer({"model": model}, compute_loss, batches, config)
    trainer.train()

What is to come follows from the weights, the optimizer, the step and the config alone: batches are looked up by epoch
and index, learning rates are functions of the step. So a checkpoint is small and a resumed run is the same run.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from refiners.fluxion.utils import manual_seed
from refiners.training import state
from refiners.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from refiners.training.clock import Clock, Period
from refiners.training.config import TrainerConfig
from refiners.training.distributed import Process, copy_whole, shard, shard_outermost, whole
from refiners.training.ema import RunningMean
from refiners.training.guard import NonFiniteError, find_bad_gradient, find_culprit
from refiners.training.interruption import Interruption, TrainingInterrupted
from refiners.training.optimizers import groups_by_rate, make_optimizer
from refiners.training.prefetch import Prefetch
from refiners.training.randomness import apart, get_randomness, mix, set_randomness
from refiners.training.schedules import rate_factor, set_learning_rate
from refiners.training.weights import TrainedWeights

_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_SMALLEST_SCALE = 2.0**-14  # a loss scale below it no longer helps: gradients are bad for another reason


class Batches(Protocol):
    """Data by place: the same place always gives the same batch.

    An attribute `fingerprint`, a string, may tell other data from this; a training resumes on the same data only.
    Another one, `contents`, may hold a string for each sample, a digest and a name, so that it is told what differs.
    """

    def __len__(self) -> int:
        """How many batches make an epoch."""
        ...

    def get(self, epoch: int, index: int, rank: int, count: int) -> Any:
        """Batch `index` of an epoch, or of `count` equal parts of it the part `rank`. May be called in any thread."""
        ...


class Callback:
    """Events of a training, for whoever wants to know or to add something: override what you need.

    With several processes, all of them call these, in step.
    """

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Everything is in place, a checkpoint loaded if there was one."""

    def on_step_end(self, trainer: "Trainer") -> None:
        """The optimizer has made a step; `trainer.metrics` tells of it."""

    def on_epoch_end(self, trainer: "Trainer") -> None:
        """An epoch has ended within the last step."""

    def on_evaluate(self, trainer: "Trainer") -> None:
        """It is time to look at the model: in evaluation mode, without gradients, with mean weights if there are any.

        What is drawn at random here has no effect on the training.
        """

    def on_log(self, trainer: "Trainer", values: Mapping[str, float]) -> None:
        """Numbers to be shown or written down."""

    def on_images(self, trainer: "Trainer", name: str, images: list[Image.Image]) -> None:
        """Pictures to be shown or written down."""

    def on_checkpoint(self, trainer: "Trainer") -> None:
        """A checkpoint was saved."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """The last step is done; the weights are the mean ones if there are any."""

    def close(self, error: BaseException | None) -> None:
        """Called in any case, at the very end."""


class Trainer:
    """Trains modules.

    models: all that gradients go through, by name; parameters are saved under it. They stay on their device.
    compute_loss: the mean loss of a batch, (); it calls the models as it likes.
    trained: the parameters that train, by any name; those of the models with `requires_grad` if not given. No other
        parameter of the models gets a gradient while `train` runs, and each `requires_grad` is as before afterwards.
    held_out: data for a loss that is computed at each evaluation.
    blocks: modules whose weights FSDP keeps together; without any, each model as a whole.

    Raises ValueError if there is nothing to train, or nothing to train on, ConfigError if the config does not fit it.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        compute_loss: Callable[[Any], Tensor],
        batches: Batches,
        config: TrainerConfig,
        *,
        trained: Mapping[str, nn.Parameter] | None = None,
        held_out: Batches | None = None,
        callbacks: Sequence[Callback] = (),
        process: Process | None = None,
        blocks: Sequence[nn.Module] = (),
    ) -> None:
        for purpose, data in (("train on", batches), ("hold out", held_out)):
            if data is not None and not len(data):
                raise ValueError(f"there is nothing to {purpose}: the {type(data).__name__} given have a length of 0")
        self.weights = TrainedWeights(models, trained)
        self.compute_loss = compute_loss
        self.batches, self.held_out = batches, held_out
        self.config = config
        self.process = process or Process()
        self.callbacks = list(callbacks)
        self.folder = config.checkpointing.save_folder
        self.metrics: dict[str, float] = {}
        self.clock = Clock(len(batches), config.training.gradient_accumulation.number)
        self.total_steps = self.clock.steps_in(config.training.duration)
        config.training.share_of(self.process.count)
        self._blocks = list(blocks)

    @property
    def models(self) -> dict[str, nn.Module]:
        """What holds the parameters."""
        return self.weights.models

    @property
    def samples_per_step(self) -> int:
        """Samples of one step, over all processes."""
        return self.config.training.batch_size * self.clock.iterations_per_step

    @property
    def checkpoint_folder(self) -> Path:
        """Where the checkpoints are."""
        return self.folder / "checkpoints"

    # -- the loop

    def train(self) -> None:
        """Train to the end, from the newest checkpoint if there is one.

        On SIGINT (Ctrl-C) or SIGTERM it ends the step, saves a checkpoint and raises TrainingInterrupted; on a second
        one it stops at once. Raises NonFiniteError if the loss or a gradient is NaN or infinite, OSError if a
        checkpoint cannot be saved, ConfigError if the checkpoint was made with other settings.
        """
        error: BaseException | None = None
        try:
            with ExitStack() as stack:
                stack.enter_context(self.weights.in_training())
                self._prepare()
                self._resume()
                prefetch = stack.enter_context(Prefetch(self._fetch))
                interruption = stack.enter_context(Interruption())
                self._emit("on_train_begin")
                while self.clock.step < self.total_steps:
                    self._step(prefetch)
                    number = self.process.largest(interruption.number or 0)
                    is_interrupted = number > 0 and self.clock.step < self.total_steps
                    self._after_step(is_interrupted)
                    if is_interrupted:
                        raise TrainingInterrupted(self.clock.step, number, self.checkpoint_folder)
                with self.mean_weights():
                    self._emit("on_train_end")
        except BaseException as raised:
            error = raised
            raise
        finally:
            for callback in self.callbacks:
                callback.close(error)

    def _step(self, prefetch: Prefetch) -> None:
        iterations, losses = self.clock.iterations_per_step, list[Tensor]()
        batches = [prefetch.take(self.clock.iteration + index) for index in range(iterations)]
        set_learning_rate(self.optimizer, rate_factor(self.config.scheduler, self.clock.step, self.total_steps))
        for index, batch in enumerate(batches):
            with self._synchronized(index == iterations - 1):
                with self._autocast():
                    loss = cast(Tensor, self._objective(batch))
                self._scaler.scale(loss / iterations).backward()
            losses.append(loss.detach())
        self._scaler.unscale_(self.optimizer)
        norm = self._clip()
        loss = self.process.mean(torch.stack(losses).mean().float())
        numbers = cast("list[float]", torch.stack([loss, norm.to(loss)]).tolist())
        self._check_finite(numbers[0], numbers[1], batches)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.step += 1
        if self.ema is not None:
            self.ema.update(self._parameters, self.clock.step)
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.metrics = {"loss": numbers[0], "learning_rate": rates[0], "gradient_norm": numbers[1]}
        if len(rates) > 1:
            self.metrics["text_encoder_learning_rate"] = rates[1]

    def _after_step(self, is_interrupted: bool) -> None:
        """An interrupted training is saved, and not evaluated, which can take longer than a machine waits."""
        training, clock = self.config.training, self.clock

        def is_due(interval: Period | None) -> bool:
            return interval is not None and (clock.is_due(interval) or clock.step == self.total_steps)

        self._emit("on_step_end")
        if is_due(training.log_interval):
            self.log({f"train/{name}": value for name, value in self.metrics.items()})
        if clock.has_ended_epoch:
            self._emit("on_epoch_end")
        if is_due(training.evaluation_interval) and not is_interrupted:
            self.evaluate()
        if is_due(self.config.checkpointing.save_interval) or is_interrupted:
            self.save()
            self._emit("on_checkpoint")

    def evaluate(self) -> None:
        """Compute the held-out loss and let callbacks look at the model; this has no effect on the training."""
        away, means = apart(self.config.training.evaluation_seed), self.mean_weights()
        with away, means, self.weights.in_mode(False), torch.no_grad():
            if self.held_out is not None:
                self.log({"held_out/loss": self._held_out_loss(self.held_out)})
            self._emit("on_evaluate")

    def log(self, values: Mapping[str, float]) -> None:
        """Give numbers to all callbacks."""
        self._emit("on_log", values)

    @contextmanager
    def mean_weights(self) -> Generator[None]:
        """Inside, the weights are those to be used, the running mean if there is one; afterwards as before."""
        with self.weights.as_means(self.optimizer, self.ema):
            yield

    @contextmanager
    def whole_weights(self) -> Generator[None]:
        """Inside, each process holds all weights, to be saved. All processes must enter."""
        with self.weights.whole():
            yield

    # -- checkpoints

    def save(self) -> None:
        """Save a checkpoint. All processes must call this. Raises OSError if it cannot be saved."""
        parts = {
            "clock": {"step": self.clock.step},
            "config": self._settings(),
            "weights": {name: whole(parameter.detach()) for name, parameter in self._parameters.items()},
            "optimizer": state.optimizer_state(self.optimizer, self._parameters),
            "scaler": self._scaler.state_dict(),
            "mean_weights": {name: whole(mean) for name, mean in self.ema.means.items()} if self.ema else {},
            "randomness": self.process.gather(get_randomness()),
            "contents": state.joined_contents(self.batches),
        }
        if self.process.is_first:
            save_checkpoint(self.checkpoint_folder, self.clock.step, parts, self.config.checkpointing.keep)
        self.process.wait()

    def _settings(self) -> dict[str, Any]:
        """All that the training follows from: the config, and what tells apart data, if the batches say it."""
        return {**self.config.model_dump(mode="json"), "data": getattr(self.batches, "fingerprint", None)}

    def _resume(self) -> None:
        """Go on from the newest checkpoint; else, and where the number of processes changed, seed all generators."""
        manual_seed(mix(self.config.training.seed, "process", self.process.rank))
        path = newest_checkpoint(self.checkpoint_folder) if self.config.checkpointing.resume else None
        if path is None:
            return
        parts = load_checkpoint(path)
        if not self.config.checkpointing.allow_changes:
            contents = (parts.get("contents", ""), state.joined_contents(self.batches))
            state.check_same_config(path, parts["config"], self._settings(), contents)
        state.check_same_weights(path, parts["weights"], self._parameters)
        for name, weight in parts["weights"].items():
            copy_whole(self._parameters[name], weight)
        if parts["config"]["optimizer"]["optimizer"] == self.config.optimizer.optimizer:  # else its state means nothing
            state.load_optimizer_state(self.optimizer, self._parameters, parts["optimizer"])
        if parts["scaler"]:
            self._scaler.load_state_dict(parts["scaler"])
        if self.ema is not None:
            for name, mean in self.ema.means.items():
                copy_whole(mean, parts["mean_weights"].get(name, parts["weights"][name]))
        self.clock.step = parts["clock"]["step"]
        if len(parts["randomness"]) == self.process.count:
            set_randomness(parts["randomness"][self.process.rank])
        else:
            manual_seed(mix(self.config.training.seed, "process", self.process.rank, self.clock.step))

    # -- preparation

    def _prepare(self) -> None:
        training, optimizer = self.config.training, self.config.optimizer
        self._objective: Any = _Objective(self.models, self.compute_loss)
        self._spread: list[Any] = []
        if self.process.count > 1 and training.parallel == "fsdp":
            self._spread = [model for model in self.models.values() if _trains(model)]
            for model in self._spread:
                inside = set(model.modules())
                shard(model, [block for block in self._blocks if block in inside], self.process)
            shard_outermost(self._objective, self.process)
        elif self.process.count > 1:
            devices = [self.process.device] if self.process.device.type == "cuda" else None
            self._objective = DistributedDataParallel(self._objective, device_ids=devices)
        self._parameters = self.weights.parameters
        groups = groups_by_rate(self._parameters, {"text_encoder": optimizer.text_encoder_learning_rate})
        self.optimizer = make_optimizer(optimizer.optimizer, groups, optimizer.learning_rate, **optimizer.own_settings)
        if hasattr(self.optimizer, "train"):  # schedule-free ones have two modes
            cast(Any, self.optimizer).train()
        self._scaler = torch.amp.GradScaler(self.process.device.type, enabled=training.precision == "float16")
        self.ema = None if training.ema_decay is None else RunningMean(self._parameters, training.ema_decay)

    # -- parts of a step

    def _fetch(self, iteration: int) -> Any:
        return self.batches.get(*self.clock.batch_at(iteration), self.process.rank, self.process.count)

    def _autocast(self) -> Any:
        dtype = _PRECISIONS.get(self.config.training.precision)
        return nullcontext() if dtype is None else torch.autocast(self.process.device.type, dtype)

    @contextmanager
    def _synchronized(self, is_last: bool) -> Generator[None]:
        """Processes exchange gradients only in the last iteration of a step."""
        for model in self._spread:
            model.set_requires_gradient_sync(is_last)
        if isinstance(self._objective, DistributedDataParallel) and not is_last:
            with self._objective.no_sync():
                yield
        else:
            yield

    def _clip(self) -> Tensor:
        """The norm of all gradients together, after which it is at most the bound that is set."""
        bound = self.config.training.clip_grad_norm
        return whole(nn.utils.clip_grad_norm_(self._parameters.values(), math.inf if bound is None else bound))

    def _check_finite(self, loss: float, norm: float, batches: Sequence[Any]) -> None:
        """Raises NonFiniteError. A bad gradient under loss scaling is none: the step is left out, the scale falls."""
        has_scale_to_lose = self._scaler.is_enabled() and self._scaler.get_scale() > _SMALLEST_SCALE
        if math.isfinite(loss) and (math.isfinite(norm) or has_scale_to_lose):
            return
        culprits = [find_culprit(self.models, lambda batch=batch: self._loss_of(batch)) for batch in batches]
        found = [culprit for each in self.process.gather(culprits) for culprit in each if culprit]
        # a bad gradient of one process is one of all, so that it tells something only if no loss does
        first, *others = found or [find_bad_gradient(self.models)]
        self.optimizer.zero_grad(set_to_none=True)
        if self.clock.step:
            self.save()
        kept = newest_checkpoint(self.checkpoint_folder)
        raise NonFiniteError(
            f"step {self.clock.step + 1} was not made, as its loss is {loss} and its gradient norm {norm}: "
            f"{first or 'the same batch, computed once more, is in order'}"
            f"{f' (and {len(others)} more)' if others else ''}; "
            f"{f'the state before it is in {kept}' if kept else 'there is no checkpoint before it'}"
        )

    def _loss_of(self, batch: Any) -> Tensor:
        with self._autocast():
            return self.compute_loss(batch)

    def _held_out_loss(self, batches: Batches) -> float:
        rank, count = self.process.rank, self.process.count
        losses = [self._loss_of(batches.get(0, index, rank, count)).float() for index in range(len(batches))]
        return self.process.mean(torch.stack(losses).mean()).item()

    def _emit(self, event: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *args)


class _Objective(nn.Module):
    """The loss as a module that holds the models: what DDP wraps."""

    def __init__(self, models: Mapping[str, nn.Module], compute_loss: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(models)
        self.compute_loss = compute_loss

    def forward(self, batch: Any) -> Tensor:
        return self.compute_loss(batch)


def _trains(model: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in model.parameters())
