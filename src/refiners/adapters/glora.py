"""GLoRA: a low-rank update, and one that the weight itself takes part in (arXiv 2306.07967, as LyCORIS has it)."""

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from refiners.adapters.delta import Scale
from refiners.adapters.factored import FactoredDelta, check_rank, map_channels, outer_rank
from refiners.adapters.layer_calls import call_layer
from refiners.weights.lora_keys.kinds import Kind


class Glora(FactoredDelta):
    """W + scale * (alpha / rank) * (W a1 a2 + b1 b2), of a linear layer or a convolution.

    a1: (in, rank). a2: (rank, in). b1: (out, rank). b2: (rank, in). For a convolution, sizes of 1 follow, but b2 is
        (rank, in, height, width), or (rank, in, 1, 1) with bm (rank, rank, height, width), the core of a Tucker
        decomposition.
    """

    kind = Kind.GLORA
    part_names = ("a1", "a2", "b1", "b2", "bm")
    largest_share: ClassVar[float] = 1 / 3
    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    bm: Tensor | None

    @classmethod
    def for_layer(
        cls,
        layer: nn.Linear | nn.Conv2d,
        name: str,
        rank: int = 16,
        alpha: float | None = None,
        scale: Scale = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A new update, which is zero at first: `a2` and `b2` are.

        device, dtype: those of the layer if not given. Raises ValueError if the rank is less than 1.
        """
        check_rank(rank)
        where: dict[str, Any] = {"device": device or layer.weight.device, "dtype": dtype or layer.weight.dtype}
        parts = {part: torch.zeros(shape, **where) for part, shape in _shapes(layer.weight.shape, rank, False).items()}
        for part in ("a1", "b1"):
            nn.init.kaiming_uniform_(parts[part], a=math.sqrt(5))
        return cls(layer, name, parts, alpha, scale)

    @property
    def rank(self) -> int:
        """How many dimensions each of the two updates goes through."""
        return outer_rank(self.a2)

    def direction(self, weight: Tensor) -> Tensor:
        """W a1 a2 + b1 b2."""
        a1, a2, b1 = self._matrices(weight.dtype)
        of_weight = torch.einsum("oi...,ir,rj->oj...", weight.to(a1.dtype), a1, a2)
        return of_weight + torch.einsum("or,ri...->oi...", b1, self._way_down(weight.dtype))

    def _through_factors(self, x: Tensor, layer: nn.Module) -> Tensor:
        a1, a2, b1 = self._matrices(x.dtype)
        weight: Any = layer.weight
        up = torch.einsum("oi...,ir->or...", weight.to(a1.dtype), a1)
        of_weight = call_layer(layer, self.scaled(map_channels(layer, x, a2)), up, None)
        return of_weight + map_channels(layer, self.scaled(call_layer(layer, x, self._way_down(x.dtype), None)), b1)

    def _matrices(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(part.flatten(1) for part in self._as(dtype, self.a1, self.a2, self.b1))

    def _way_down(self, dtype: torch.dtype) -> Tensor:
        down, *core = self._as(dtype, self.b2, self.bm)
        return torch.einsum("rshw,si->rihw", core[0], down.flatten(1)) if core else down

    @property
    def _multiplications(self) -> int:
        kernel = self.shape[2:].numel()
        return self.rank * (self.shape[0] + self.shape[1]) * (1 + kernel)

    def _problem(self) -> str | None:
        if self.bm is not None and len(self.shape) == 2:
            return "it has the core of a convolution, and the layer is linear"
        return self._shape_problem(_shapes(self.shape, self.rank, self.bm is not None))


def _shapes(weight: torch.Size, rank: int, has_core: bool) -> dict[str, tuple[int, ...]]:
    (out, inner), kernel = weight[:2], tuple(weight[2:])
    ones = (1,) * len(kernel)
    shapes = {"a1": (inner, rank, *ones), "a2": (rank, inner, *ones), "b1": (out, rank, *ones)}
    if has_core:
        return {**shapes, "b2": (rank, inner, *ones), "bm": (rank, rank, *kernel)}
    return {**shapes, "b2": (rank, inner, *kernel)}
