"""`FactoredDelta`: what updates of a whole weight have in common whose tensors are factors of it (LoHa, LoKr)."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refiners.adapters.delta import RankedDelta, Scale
from refiners.adapters.parts_delta import PartsDelta


class FactoredDelta(RankedDelta, PartsDelta):
    """An update of a linear layer or a convolution whose factors make up a weight of the layer's shape.

    parts: the factors by name, which it takes as they are.

    Raises ValueError, with the reason, if the factors are not those of such an update or do not fit the layer.
    """

    # How many of all multiplications of a pass through the layer's weight those through the factors may come to. Three
    # such passes (forward and, on the way back, for the input and the factors) stand against the one more that the
    # gradient of a whole weight takes.
    largest_share: ClassVar[float]

    def __init__(
        self,
        layer: nn.Module,
        name: str,
        parts: Mapping[str, Tensor],
        alpha: float | None = None,
        scale: Scale = 1.0,
    ) -> None:
        super().__init__(name, scale, alpha)
        self._take_parts(layer, parts)
        self._has_cheap_factors = self._multiplications < self.largest_share * self.shape.numel()
        self._make_numbers()

    @classmethod
    def from_parts(
        cls, layer: nn.Module, name: str, parts: Mapping[str, Tensor], alpha: float | None = None, scale: Scale = 1.0
    ) -> Self:
        """As the constructor."""
        return cls(layer, name, parts, alpha, scale)

    @property
    def runs_as_weight(self) -> bool:
        """Small layers run faster with the whole weight, large ones through the factors."""
        return not self._has_cheap_factors

    def forward(self, x: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
        """As in `Delta`; through the factors if that is faster."""
        if not self._has_cheap_factors or getattr(layer, "groups", 1) != 1:
            return super().forward(x, output, layer)
        return self._through_factors(x.to(torch.promote_types(x.dtype, self.dtype)), layer).to(output.dtype)

    @abstractmethod
    def _through_factors(self, x: Tensor, layer: nn.Module) -> Tensor:
        """The scaled update of the output of a layer of one group; x in a format no narrower than the factors'."""

    @property
    @abstractmethod
    def _multiplications(self) -> float:
        """How many `_through_factors` takes for one position of the output."""


def outer_rank(tensor: Tensor | None) -> int:
    """The size of the first dimension, which is the rank; 0 if there is none."""
    return tensor.shape[0] if tensor is not None and tensor.ndim else 0


def map_channels(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Map the features of a linear layer or the channels of a convolution by a weight (out, in)."""
    return F.linear(x, weight) if isinstance(layer, nn.Linear) else F.conv2d(x, weight[:, :, None, None])


def check_rank(rank: int) -> None:
    """Raises ValueError if a new update cannot have this rank."""
    if rank < 1:
        raise ValueError(f"the rank of a weight update must be at least 1, not {rank}")
