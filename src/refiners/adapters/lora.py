"""LoRA: adds low-rank updates to a layer, W x + scale * (alpha / rank) * up(down(x)) (arXiv 2106.09685, section 4.1).

Any number of updates on one layer run as one product down and one up.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from refiners.adapters.adapter import Adapter
from refiners.adapters.low_rank import Conv2dLora, LinearLora, Lora, lora_for, needs_cast
from refiners.fluxion.layers.combinators import Sum
from refiners.fluxion.layers.module import WeightedModule

__all__ = ["Conv2dLora", "LinearLora", "Lora", "LoraAdapter"]


class LoraAdapter(Sum, Adapter[WeightedModule]):
    """Adds low-rank updates to a linear layer or a convolution.

    target: the layer, or the adapter that sits on it.
    *loras: the updates. If there are none, a new one is made, which starts as zero:
    name, rank, scale, alpha, device, dtype: of the new one; device and dtype are the target's if not given.

    Raises TypeError if the target is no such layer, ValueError if an update does not fit it.

    >>> import refiners.fluxion.layers as fl
    >>> model = fl.Chain(fl.Linear(8, 4))
    >>> adapter = LoraAdapter(model.Linear, rank=2, scale=0.5).inject()
    >>> adapter.scales
    {'lora': 0.5}
    """

    # What runs, worked out by _refresh: own updates and those of LoRA adapters in the hole, if they can run as one.
    _base: nn.Module
    _stack: tuple[Lora[Any], ...] = ()
    _inner: tuple[nn.Module, ...] = ()  # the adapters in the hole that are then not called

    def __init__(
        self,
        target: WeightedModule,
        *loras: Lora[Any],
        rank: int = 16,
        scale: float = 1.0,
        alpha: float | None = None,
        name: str = "lora",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layer = target.base if isinstance(target, Adapter) else target
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise TypeError(f"LoraAdapter adapts a Linear or a Conv2d, not a {type(layer).__name__}")
        loras = loras or (lora_for(layer, name, rank, scale, alpha, device, dtype),)
        for index, lora in enumerate(loras):
            _check_fits(lora, layer, [other.name for other in loras[:index]])
        with self.setup_adapter(target):
            super().__init__(target, *loras)

    @property
    def loras(self) -> dict[str, Lora[Any]]:
        """The updates of this adapter by name."""
        return {lora.name: lora for lora in self if isinstance(lora, Lora)}

    @property
    def names(self) -> list[str]:
        """The names of the updates."""
        return list(self.loras)

    @property
    def scales(self) -> dict[str, float]:
        """The scale of each update by name."""
        return {name: lora.scale for name, lora in self.loras.items()}

    @property
    def scale(self) -> float:
        """The scale of the only update. Raises AttributeError if there are several: see `scales` and `loras`."""
        if len(scales := self.scales) != 1:
            raise AttributeError(f"there are {len(scales)} LoRAs here ({', '.join(scales)}): use loras[name].scale")
        return next(iter(scales.values()))

    @scale.setter
    def scale(self, value: float) -> None:
        for lora in self.loras.values():
            lora.scale = value

    def add_lora(self, lora: Lora[Any], /) -> None:
        """Add one more update. Raises ValueError if its name is taken or its shape does not fit."""
        _check_fits(lora, self.base, self.names)
        self.append(lora)

    def remove_lora(self, name: str, /) -> Lora[Any]:
        """Take an update away and return it. Raises KeyError if there is none of that name."""
        if name not in self.loras:
            raise KeyError(f"no LoRA {name!r} here; there are: {', '.join(self.names) or 'none'}")
        lora = self.loras[name]
        self.remove(lora)
        return lora

    def forward(self, *inputs: Any) -> Any:
        if not self._stack or len(inputs) != 1 or _have_hooks(self._inner, self._stack):
            return super().forward(*inputs)
        (x,) = inputs
        base = self._base(x)
        down, up = self._down_and_up()
        dtype = down.dtype
        factors = [cast(Tensor, lora._buffers["factor"]) for lora in self._stack]
        factor = factors[0] if len(factors) == 1 else torch.cat(factors)
        if factor.dtype is not dtype:
            factor = factor.to(dtype)
        if needs_cast(x, dtype):
            zero = torch.zeros_like(base, dtype=dtype)
            return base + self._stack[0].add_to(zero, x.to(dtype), down, up, factor).to(base.dtype)
        return self._stack[0].add_to(base, x, down, up, factor)

    def _down_and_up(self) -> tuple[Tensor, Tensor]:
        """The weights of the stack, concatenated along the rank.

        Not kept between calls: nothing tells of all changes (those through `.data` count no version).
        """
        downs = [_weight(lora, "down") for lora in self._stack]
        ups = [_weight(lora, "up") for lora in self._stack]
        return (downs[0], ups[0]) if len(downs) == 1 else (torch.cat(downs), torch.cat(ups, dim=1))

    def _refresh(self) -> None:
        super()._refresh()
        base, stack = (self._plan or (nn.Identity(),))[0], self._plan[1:]  # no plan: a constructor was taken back
        inner: list[LoraAdapter] = []
        while isinstance(base, LoraAdapter) and base.parent is (inner[-1] if inner else self):
            inner.append(base)
            base, stack = base._plan[0], (*base._plan[1:], *stack)
        kind = type(stack[0]) if stack else None
        fits = kind in (LinearLora, Conv2dLora) and all(type(lora) is kind for lora in stack)
        loras = cast("tuple[Lora[Any], ...]", stack) if fits else ()
        loras = loras if loras and type(loras[0]).can_stack(loras) else ()
        self.__dict__.update(_base=base, _stack=loras, _inner=tuple(inner))

    def __getstate__(self) -> dict[str, Any]:
        derived = ("_base", "_stack", "_inner")
        return {name: value for name, value in super().__getstate__().items() if name not in derived}


def _have_hooks(inner: Sequence[nn.Module], loras: Sequence[Lora[Any]]) -> bool:
    """Whether someone hooked into one of these or its maps, and so wants to see it called."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    for module in (*inner, *loras):
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
    for lora in loras:
        for part in cast("Iterable[nn.Module]", lora._modules.values()):
            if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
                return True
    return False


def _weight(lora: Lora[Any], part: str) -> Tensor:
    """`lora.down.weight` without torch's slow way to it, unless it is computed (parametrized)."""
    layer = cast(nn.Module, lora._modules[part])
    weight = layer._parameters.get("weight")
    return cast(Tensor, layer.weight) if weight is None else weight


def _check_fits(lora: Lora[Any], layer: nn.Module, taken: list[str]) -> None:
    if lora.name in taken:
        raise ValueError(f"there is a LoRA {lora.name!r} on this layer already: give it another name")
    misfit = lora.misfit(layer)
    if misfit is not None:
        raise ValueError(f"LoRA {lora.name!r} does not fit: {misfit}")
