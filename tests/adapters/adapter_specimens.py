"""Small trees, adapters of every shape that an author may give one, and pictures of trees to compare."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.adapters import Adapter, LoraAdapter

WIDTH = 4


def make_model(seed: int = 0) -> fl.Chain:
    """Leaves and chains of several depths, parameters and buffers, all of them random; ready for use (eval)."""
    torch.manual_seed(seed)
    model = fl.Chain(
        fl.Linear(WIDTH, WIDTH),
        fl.Residual(fl.Linear(WIDTH, WIDTH), fl.ReLU(), fl.Linear(WIDTH, WIDTH)),
        nn.BatchNorm1d(WIDTH),
        fl.Chain(fl.LayerNorm(WIDTH), fl.Linear(WIDTH, WIDTH)),
    )
    randomize(model)
    return model.eval()


def make_input(seed: int = 1) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))


def randomize(module: nn.Module) -> None:
    """Give every parameter, and every buffer that is saved, a random value: one that is zero or one proves nothing."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not name.endswith("alpha"):
            tensor.data.uniform_(0.25, 1.0) if "running_var" in name else tensor.data.normal_(std=0.5)


class Doubled(fl.Chain, Adapter[nn.Module]):
    """2 f(x): wraps its target, has no tensor of its own."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(target, fl.Multiply(2.0))

    def expected(self, target: nn.Module, x: Tensor) -> Tensor:
        return target(x) * 2


class Deep(fl.Chain, Adapter[nn.Module]):
    """x + f(x): the target sits three chains down."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(fl.Residual(fl.Identity(), fl.Chain(fl.Chain(target))), fl.Identity())

    def expected(self, target: nn.Module, x: Tensor) -> Tensor:
        return x + target(x)


class Side(fl.Sum, Adapter[nn.Module]):
    """f(x) + W x: a layer of its own beside the target."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(target, fl.Linear(WIDTH, WIDTH))

    def expected(self, target: nn.Module, x: Tensor) -> Tensor:
        return target(x) + self[-1](x)


class Skip(fl.Residual, Adapter[nn.Module]):
    """x + f(norm(x)): a layer of its own before the target."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(fl.LayerNorm(WIDTH), target)

    def expected(self, target: nn.Module, x: Tensor) -> Tensor:
        return x + target(self[0](x))


class Replaced(fl.Chain, Adapter[nn.Module]):
    """W x: leaves its target out, so that it does not run."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(fl.Linear(WIDTH, WIDTH))

    def expected(self, target: nn.Module, x: Tensor) -> Tensor:
        return self[0](x)


class Gain(fl.Chain, Adapter[nn.Module]):
    """gain f(x): a parameter and a buffer that belong to the adapter itself, and a forward of its own."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(target)
        self.gain = nn.Parameter(torch.full((1,), 1.5))
        self.register_buffer("offset", torch.full((1,), 0.25))

    def forward(self, *args: Any) -> Any:
        return super().forward(*args) * self.gain + self.offset

    def expected(self, target: nn.Module, x: Tensor) -> Tensor:
        return target(x) * self.gain + self.offset


class Spread(fl.Chain, Adapter[fl.Chain]):
    """Adapts a chain, and every Linear inside it by an adapter of its own."""

    def __init__(self, target: fl.Chain) -> None:
        with self.setup_adapter(target):
            super().__init__(target)
        self.parts = [Side(linear) for linear in target.layers(nn.Linear)]

    def inject(self, parent: fl.Chain | None = None) -> "Spread":
        for part in self.parts:
            part.inject()
        return super().inject(parent)

    def eject(self) -> None:
        super().eject()
        for part in self.parts:
            part.eject()


KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Doubled, Deep, Side, Skip, Replaced, Gain)}
PLACES = {"leaf": "Linear", "deep leaf": "Residual.Linear_2", "chain": "Residual", "root": ""}


def adapted(kind: str, path: str, model: fl.Chain) -> Any:
    """An adapter of a kind, injected on the target at a path, its own tensors random."""
    adapter = KINDS[kind](attrgetter(path)(model) if path else model).inject()
    randomize_own(adapter)
    return adapter


def randomize_own(adapter: Any) -> None:
    theirs = {id(parameter) for parameter in adapter.target.parameters()}
    for parameter in adapter.parameters():
        if id(parameter) not in theirs:
            parameter.data.normal_(std=0.5)


def lora_on(target: Any, rank: int = 2, **options: Any) -> LoraAdapter:
    """A LoRA adapter on a layer, not injected; its up weights, zero by default, are random."""
    adapter = LoraAdapter(target, rank=rank, **options)
    for lora in adapter.loras.values():
        nn.init.normal_(lora.up.weight)
    return adapter


def picture(module: nn.Module) -> list[Any]:
    """All that must be as before after an adapter is gone: who sits where, whose parent is who, and every name."""
    return [
        list(_seats(module)),
        list(module.state_dict()),
        [(name, id(tensor)) for name, tensor in module.named_parameters()],
        [(name, id(tensor)) for name, tensor in module.named_buffers()],
        [(name, id(part)) for name, part in module.named_modules()],
    ]


def _seats(module: nn.Module, path: str = "") -> Iterator[tuple[Any, ...]]:
    yield path, module, getattr(module, "_parent", None), getattr(module, "_plan", None)
    for slot, child in module._modules.items():
        assert child is not None
        yield from _seats(child, f"{path}/{slot}")
