"""The loop that all parts of the pretraining share: AdamW, an average of the weights, checkpoints, going on.

Every step draws its own data from its own seed, so that the weights, their averages, what AdamW remembers and the
number of the step are all that a run needs to go on as if it had not been interrupted.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from refiners.weights.files import read_metadata, read_safetensors, write_safetensors


@dataclass(frozen=True)
class Plan:
    """How to train.

    steps: how many in all. A run that ended goes on if there are more.
    peak_rate: the learning rate after `warm_up` steps, until it falls in a line to 0 over the last `decay` of steps.
    averaging: the largest share that the average of the weights keeps in a step; early on it is less.
    """

    steps: int
    peak_rate: float
    warm_up: int = 100
    decay: float = 0.3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    averaging: float = 0.999
    max_gradient: float = 1.0
    save_every: int = 200
    report_every: int = 50

    def rate(self, step: int) -> float:
        """The learning rate of a step, 0 … steps - 1."""
        rising = min(1.0, (step + 1) / self.warm_up)
        falling = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.peak_rate * rising * falling


class Trainee:
    """A model in training: what AdamW remembers of it, and the average of its weights."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model = model
        self.plan = plan
        self.step = 0
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        matrices = [value for name, value in self.parameters.items() if _decays(name, value)]
        others = [value for name, value in self.parameters.items() if not _decays(name, value)]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=plan.peak_rate, betas=plan.betas, weight_decay=plan.weight_decay, fused=True
        )
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}

    def learn(self, loss: Tensor) -> Tensor:
        """One step down the gradient of `loss`, and the norm of that, 0-d. Nothing here waits for the device."""
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.plan.max_gradient)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.step)
        self.optimizer.step()
        self.step += 1
        share = min(self.plan.averaging, (1 + self.step) / (10 + self.step))
        averages, values = [*self.average.values()], [value.detach() for value in self.parameters.values()]
        with torch.no_grad():
            get_ema_multi_avg_fn(share)(averages, values, self.step)
        return norm

    def save(self, path: Path) -> None:
        """Write all that is needed to go on; the file is whole at any moment."""
        tensors: dict[str, Tensor] = {}
        for name, value in self.parameters.items():
            memory = self.optimizer.state[value]
            tensors[f"weight.{name}"] = value.detach()
            tensors[f"average.{name}"] = self.average[name]
            tensors[f"mean.{name}"] = memory["exp_avg"]
            tensors[f"square.{name}"] = memory["exp_avg_sq"]
        write_safetensors(path, tensors, metadata={"step": str(self.step)})

    def load(self, path: Path) -> None:
        """Take up where `save` left off. Raises KeyError or RuntimeError if the file is of another model."""
        tensors = read_safetensors(path)
        self.step = int(read_metadata(path)["step"])
        for name, value in self.parameters.items():
            value.data.copy_(tensors[f"weight.{name}"])
            self.average[name].copy_(tensors[f"average.{name}"])
            self.optimizer.state[value] = {
                "step": torch.tensor(float(self.step), device=value.device),
                "exp_avg": tensors[f"mean.{name}"].to(value.device, copy=True),
                "exp_avg_sq": tensors[f"square.{name}"].to(value.device, copy=True),
            }

    def use_average(self) -> None:
        """Give the model the average of its weights, at the end."""
        for name, value in self.parameters.items():
            value.data.copy_(self.average[name])


def train(
    name: str,
    model: nn.Module,
    plan: Plan,
    loss_of: Callable[[torch.Generator], Tensor],
    folder: Path,
    report: Callable[[str], None] = print,
    at_save: Callable[[Trainee], None] | None = None,
) -> None:
    """Train a model to the end of its plan, from its checkpoint in `folder` if there is one; then average.

    Raises FloatingPointError if gradients are no longer finite; the last checkpoint is from before.

    loss_of: the loss of one step; all that it draws by lot comes from the generator, on the device of the model.
    at_save: called after each checkpoint.
    """
    trainee, path = Trainee(model, plan), folder / f"{name}.safetensors"
    if path.exists():
        trainee.load(path)
    generator = torch.Generator(next(iter(trainee.parameters.values())).device)
    losses, norms, first, start = list[Tensor](), list[Tensor](), trainee.step, time.monotonic()
    while trainee.step < plan.steps:
        generator.manual_seed(trainee.step)
        loss = loss_of(generator)
        norms.append(trainee.learn(loss))
        losses.append(loss.detach())
        is_saved = trainee.step % plan.save_every == 0 or trainee.step == plan.steps
        is_reported = trainee.step % plan.report_every == 0
        if not (is_reported or is_saved):
            continue
        if not math.isfinite(torch.stack(norms).sum().item()):
            raise FloatingPointError(
                f"a gradient in the {len(norms)} steps up to {trainee.step} is not finite; lower the learning rate"
            )
        mean = torch.stack(losses).mean().item()
        losses.clear()
        norms.clear()
        if is_reported:
            seconds = (time.monotonic() - start) / (trainee.step - first)
            report(f"{time.strftime('%H:%M:%S')} {name} {trainee.step}: loss {mean:.4f}, {seconds:.4f} s a step")
        if is_saved:
            trainee.save(path)
            if at_save is not None:
                at_save(trainee)
    trainee.use_average()


def load_average(model: nn.Module, path: Path) -> None:
    """Give a model the average of the weights of a checkpoint. Raises as `Trainee.load`."""
    tensors = read_safetensors(path)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(tensors[f"average.{name}"])


def _decays(name: str, value: Tensor) -> bool:
    """Matrices and kernels decay; biases, norms and the vectors of words do not: a rare word must not fade away."""
    return value.ndim > 1 and "TokenEncoder" not in name


def reporter(folder: Path) -> Callable[[str], None]:
    """Prints a line, and adds it to the progress file of `folder`."""

    def report(line: str) -> None:
        print(line, flush=True)
        with open(folder / "progress.md", "a", encoding="utf-8") as file:
            file.write(f"- {line}\n")

    return report
