"""The weights that train: which they are, that no other one does, and what stands in for them at times."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from refiners.training.distributed import whole
from refiners.training.ema import RunningMean


class TrainedWeights:
    """The parameters that train among those of some models.

    trained: the parameters that train; None for those with `requires_grad`.
    Raises ValueError if there is none, or one is in none of the models.
    """

    def __init__(self, models: Mapping[str, nn.Module], trained: Mapping[str, nn.Parameter] | None) -> None:
        self.models = dict(models)
        wanted = None if trained is None else {id(parameter) for parameter in trained.values()}
        found = {
            name: id(parameter)
            for name, parameter in self.all_parameters()
            if (parameter.requires_grad if wanted is None else id(parameter) in wanted)
        }
        if wanted and not wanted <= set(found.values()):
            lost = len(wanted - set(found.values()))
            raise ValueError(f"{lost} of {len(wanted)} parameters to train are in none of the models")
        if not found:
            where = f" in {', '.join(self.models)}" if self.models else ""
            raise ValueError(
                f"there is no parameter to train{where}: inject an adapter first, or set requires_grad on what should "
                "train"
            )
        self.names = list(found)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        self._drop_gathered()
        found = dict(self.all_parameters())
        return {name: found[name] for name in self.names}

    def all_parameters(self) -> Generator[tuple[str, nn.Parameter]]:
        """Every parameter of the models; the names start with that of the model."""
        for key, model in self.models.items():
            for name, parameter in model.named_parameters():
                yield f"{key}.{name}", parameter

    @contextmanager
    def in_training(self) -> Generator[None]:
        """Inside, the parameters that train, and no other, get gradients, and all modules are in training mode.

        Afterwards each parameter and module is set as before.
        """
        required = [(parameter, parameter.requires_grad) for _, parameter in self.all_parameters()]
        wanted = set(self.names)
        with self.in_mode(True):
            for name, parameter in self.all_parameters():
                parameter.requires_grad_(name in wanted)
            try:
                yield
            finally:
                for parameter, was_required in required:
                    parameter.requires_grad_(was_required)

    @contextmanager
    def in_mode(self, is_training: bool) -> Generator[None]:
        """Inside, all modules are in training mode or in evaluation mode; afterwards each is in its own again."""
        modes = [(module, module.training) for model in self.models.values() for module in model.modules()]
        for model in self.models.values():
            model.train(is_training)
        try:
            yield
        finally:
            for module, was_training in modes:
                module.training = was_training

    @contextmanager
    def as_means(self, optimizer: Optimizer, ema: RunningMean | None) -> Generator[None]:
        """Inside, the weights are those to be used: the running mean, or what a schedule-free optimizer means.

        Afterwards they are what they were, to the bit.
        """
        finish = getattr(optimizer, "eval", None)
        if ema is None and finish is None:
            yield
            return
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        modes: list[Any] = [group.get("train_mode") for group in optimizer.param_groups]
        if finish is not None:
            finish()
        if ema is not None:
            self.copy(ema.means)
        try:
            yield
        finally:
            self.copy(kept)
            for group, mode in zip(optimizer.param_groups, modes, strict=True):
                group.update({} if mode is None else {"train_mode": mode})

    @contextmanager
    def whole(self) -> Generator[None]:
        """Inside, each process holds all weights, to be saved, not to compute with. All processes must enter."""
        self._drop_gathered()
        spread: list[tuple[nn.Module, str, nn.Parameter]] = []
        full: dict[int, nn.Parameter] = {}
        for model in self.models.values():
            for module in model.modules():
                for name, parameter in module._parameters.items():
                    if isinstance(parameter, DTensor):
                        spread.append((module, name, parameter))
        for module, name, parameter in spread:
            if id(parameter) not in full:
                full[id(parameter)] = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
            module._parameters[name] = full[id(parameter)]
        try:
            yield
        finally:
            for module, name, parameter in spread:
                module._parameters[name] = parameter

    def _drop_gathered(self) -> None:
        """Have FSDP drop the whole weights that it may still hold from the last forward pass.

        It keeps those of the outermost module, for a backward pass that does not come after an evaluation.
        """
        for model in self.models.values():
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    @torch.no_grad()
    def copy(self, weights: Mapping[str, Tensor]) -> None:
        """Copy values into the parameters that train."""
        parameters = self.parameters
        for name, weight in weights.items():
            parameters[name].copy_(weight)
