"""`Lora`: low-rank maps x -> scale * (alpha / rank) * up(down(x)) (arXiv 2106.09685, section 4.1), of any layers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from refiners.adapters.delta import RankedDelta, Scale, repeated
from refiners.fluxion.layers.module import WeightedModule
from refiners.weights.lora_keys.kinds import Kind

Map = TypeVar("Map", bound=WeightedModule)


class Lora(RankedDelta, ABC, Generic[Map]):
    """A low-rank map up(down(x)), times scale * alpha / rank. Starts as zero: `down` is random, `up` is zero.

    name: what tells it from others on the same layer.
    scale: how strong it is now; alpha: how strong its maker meant it to be (saved with the weights), rank if not given.
    """

    kind = Kind.LORA
    _trailing: tuple[int, ...] = ()  # sizes of 1 that spread `factor` over the dimensions behind the channels
    _factor_dims = 1
    down: Map
    up: Map
    factor: Tensor  # (rank,), or (n, rank) for n samples

    def __init__(self, name: str, down: Map, up: Map, scale: Scale, alpha: float | None) -> None:
        super().__init__(name, scale, alpha)
        self.down = down
        self.up = up
        self._make_numbers()
        if not self.down.weight.is_meta:  # weights that come later need no start, and torch is slow to give none
            nn.init.normal_(self.down.weight, std=1 / self.rank)
            nn.init.zeros_(self.up.weight)

    @classmethod
    @abstractmethod
    def for_layer(
        cls,
        layer: Any,
        name: str,
        rank: int = 16,
        scale: Scale = 1.0,
        alpha: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A new update, which is zero at first. device, dtype: those of the layer if not given."""

    @property
    def runs_as_weight(self) -> bool:
        """Two small products take less than one with the whole weight."""
        return False

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.down.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the weights."""
        return self.down.weight.dtype

    @classmethod
    def can_stack(cls, loras: "Sequence[Lora[Any]]") -> bool:
        """Whether these maps, all of this class, can run as one whose rank is the sum of theirs."""
        return True

    def factors(self) -> tuple[Tensor, Tensor]:
        """The weights of the way down (rank, in, ...) and up (out, rank, ...), as they run."""
        return weight_of(self, "down"), weight_of(self, "up")

    def _factors_for(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The factors in a number format that holds both theirs and that of a layer's weight."""
        down, up = self.factors()
        dtype = torch.promote_types(weight.dtype, down.dtype)
        return down.to(dtype), up.to(dtype)

    @abstractmethod
    def add_to(self, base: Tensor, x: Tensor, down: Tensor, up: Tensor, factor: Tensor) -> Tensor:
        """The sum of `base` and the update of `x` by these weights: its own, or those of several maps as of one.

        down (R, ...), up (out, R, ...) and factor (R,) or (B, R), for R the sum of the ranks and B samples.
        """

    @abstractmethod
    def is_update_of(self, layer: nn.Module) -> bool:
        """Whether `layer` does nothing but map by its weight, and this map is the same as a part of that."""

    def added_to_weight(self, weight: Tensor, down: Tensor, up: Tensor, factor: Tensor) -> Tensor:
        """The sum of a layer's weight and the update by weights as `add_to` takes them, with factor (R,)."""
        return torch.addmm(weight.flatten(1), up.flatten(1) * factor, down.flatten(1)).view_as(weight)

    def update(self, x: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
        """As in `Delta`; a LoRA needs neither the layer nor its output."""
        return self(x)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # see `update`
        h = self.down(x.to(self.dtype) if needs_cast(x, self.dtype) else x)
        return self.up(h * self._spread(self.factor.to(h.dtype), h)).to(x.dtype)

    def load_weights(self, down_weight: Tensor, up_weight: Tensor, alpha: float | None = None) -> None:
        """Copy weights of the same shapes into this map, in place. Raises ValueError if a shape differs."""
        self._check_shapes(down=down_weight, up=up_weight)
        with torch.no_grad():
            self.down.weight.copy_(down_weight)
            self.up.weight.copy_(up_weight)
        if alpha is not None:
            self.set_alpha(alpha)

    def parts(self) -> dict[str, Tensor]:
        """As `from_parts` takes them: "down" (rank, in, ...) and "up" (out, rank, ...)."""
        return {"down": self.down.weight, "up": self.up.weight}

    def _check_shapes(self, **weights: Tensor) -> None:
        """Raises ValueError if weights, by part, are not of the shapes of those here."""
        for part, weight in weights.items():
            ours, theirs = tuple(weight_of(self, part).shape), tuple(weight.shape)
            if ours != theirs:
                raise ValueError(f"LoRA {self.name!r}: the {part} weight has shape {theirs}, this one needs {ours}")

    def _spread(self, factor: Tensor, h: Tensor) -> Tensor:
        """Factors in a shape that multiplies h (B, ..., rank), or (B, rank, H, W) of a convolution."""
        if factor.ndim == 1:
            return factor.view(-1, *self._trailing)
        middle = [1] * (h.ndim - 2 - len(self._trailing))
        return repeated(factor, h.shape[0]).view(h.shape[0], *middle, -1, *self._trailing)

    def _factor(self, device: torch.device) -> Tensor:
        strength = self._strength
        if isinstance(strength, float):
            return torch.full((self.rank,), strength, dtype=torch.float32, device=device)
        return torch.tensor(strength, dtype=torch.float32, device=device).unsqueeze(-1).repeat(1, self.rank)

    def _single_factor(self) -> Tensor:
        return super()._single_factor()[0]


def needs_cast(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether `x` has to be brought to `dtype` by hand, as autocast does not do it."""
    return x.dtype is not dtype and not is_autocast_on(x)


def is_autocast_on(x: Tensor) -> bool:
    """Whether products with `x` run in the precision of autocast."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def check_rank(rank: int, groups: int = 1) -> None:
    """Raises ValueError if a LoRA for so many groups cannot have this rank."""
    if rank < 1 or rank % groups:
        raise ValueError(f"the rank of a LoRA must be at least 1 and a multiple of its {groups} groups, not {rank}")


def with_weights(lora: Any, down: Tensor, up: Tensor) -> Any:
    """A LoRA with the tensors given in the place of its own."""
    lora.down.weight = nn.Parameter(down.detach())
    lora.up.weight = nn.Parameter(up.detach())
    lora._make_numbers()
    return lora


def weight_of(lora: Lora[Any], part: str) -> Tensor:
    """`lora.down.weight` without torch's slow way to it, unless it is computed (parametrized)."""
    layer = cast(nn.Module, lora._modules[part])
    weight = layer._parameters.get("weight")
    return cast(Tensor, layer.weight) if weight is None else weight
