"""LoRA of linear layers."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refiners.adapters.delta import Scale
from refiners.adapters.low_rank import Lora, check_rank, with_weights
from refiners.fluxion.layers.linear import Linear


class LinearLora(Lora[Linear]):
    """A low-rank update of a linear layer: (..., in_features) to (..., out_features)."""

    def __init__(
        self,
        name: str,
        /,
        in_features: int,
        out_features: int,
        rank: int = 16,
        scale: Scale = 1.0,
        alpha: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_rank(rank)
        down = Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        up = Linear(rank, out_features, bias=False, device=device, dtype=dtype)
        super().__init__(name, down, up, scale, alpha)

    @classmethod
    def from_weights(
        cls, name: str, /, down: Tensor, up: Tensor, scale: Scale = 1.0, alpha: float | None = None
    ) -> Self:
        """A LoRA of given weights, down (rank, in_features) and up (out_features, rank), which it takes as they are."""
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise ValueError(f"LoRA {name!r}: down {tuple(down.shape)} and up {tuple(up.shape)} do not share a rank")
        lora = cls(name, down.shape[1], up.shape[0], down.shape[0], scale, alpha, device="meta", dtype=down.dtype)
        return with_weights(lora, down, up)

    @classmethod
    def for_layer(
        cls,
        layer: nn.Linear,
        name: str,
        rank: int = 16,
        scale: Scale = 1.0,
        alpha: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A new update, which is zero at first. device, dtype: those of the layer if not given."""
        where: dict[str, Any] = {"device": device or layer.weight.device, "dtype": dtype or layer.weight.dtype}
        return cls(name, layer.in_features, layer.out_features, rank, scale, alpha, **where)

    @property
    def rank(self) -> int:
        """How many dimensions the map goes through."""
        return self.down.out_features

    @property
    def in_features(self) -> int:
        """Size of the last dimension of the input."""
        return self.down.in_features

    @property
    def out_features(self) -> int:
        """Size of the last dimension of the output."""
        return self.up.out_features

    def misfit(self, layer: nn.Module) -> str | None:
        """Why this map cannot be added to `layer`, or None if it can."""
        if not isinstance(layer, nn.Linear):
            return f"it updates a linear layer, not a {type(layer).__name__}"
        ours, theirs = (self.in_features, self.out_features), (layer.in_features, layer.out_features)
        if ours == theirs:
            return None
        return f"it maps {ours[0]} to {ours[1]} features, the layer {theirs[0]} to {theirs[1]}"

    @classmethod
    def from_parts(
        cls, layer: nn.Module, name: str, parts: Mapping[str, Tensor], alpha: float | None = None, scale: Scale = 1.0
    ) -> Self:
        """A LoRA of "down" (rank, in_features) and "up" (out_features, rank)."""
        return cls.from_weights(name, parts["down"], parts["up"], scale, alpha).checked_for(layer)

    def direction(self, weight: Tensor) -> Tensor:
        """The product of the way up and the way down."""
        down, up = self._factors_for(weight)
        return up @ down

    def is_update_of(self, layer: nn.Module) -> bool:
        """Whether `layer` is linear and nothing else, as some that derive from one are not."""
        return type(layer).forward in (Linear.forward, nn.Linear.forward)

    def add_to(self, base: Tensor, x: Tensor, down: Tensor, up: Tensor, factor: Tensor) -> Tensor:
        """The sum of `base` and the update: two matrix products, the second of which also adds."""
        h = F.linear(x, down)
        h = h * (factor if factor.ndim == 1 else self._spread(factor, h))
        if base.ndim == 2:
            return torch.addmm(base, h, up.t())
        return torch.addmm(base.reshape(-1, base.shape[-1]), h.reshape(-1, h.shape[-1]), up.t()).view(base.shape)
