"""LoHa: the elementwise product of two low-rank matrices, of up to the square of their rank (arXiv 2108.06098)."""

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from refiners.adapters.delta import Scale
from refiners.adapters.factored import FactoredDelta, check_rank, map_channels, outer_rank
from refiners.adapters.layer_calls import call_layer
from refiners.weights.lora_keys.kinds import Kind


class Loha(FactoredDelta):
    """W + scale * (alpha / rank) * (w1_a w1_b) * (w2_a w2_b), of a linear layer or a convolution.

    w1_a, w2_a: (out, rank). w1_b, w2_b: (rank, in), for a convolution (rank, in * height * width).
    With t1 and t2 (rank, rank, height, width), the cores of two Tucker decompositions, w1_a and w2_a are (rank, out),
    w1_b and w2_b (rank, in).
    """

    kind = Kind.LOHA
    part_names = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
    # 320 features at rank 8 took 1.3 times the training step of a LoRA as a weight, 1.4 through the factors (256 rows
    # on one CPU); 640 took 2.0 and 1.3.
    largest_share: ClassVar[float] = 1 / 3
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None
    t2: Tensor | None

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
        has_cores: bool = False,
    ) -> Self:
        """A new update, which is zero at first: `w2_a` is.

        device, dtype: those of the layer if not given.
        has_cores: whether it is a product of Tucker decompositions, if the layer has a kernel of more than one element.
        Raises ValueError if the rank is less than 1.
        """
        check_rank(rank)
        where: dict[str, Any] = {"device": device or layer.weight.device, "dtype": dtype or layer.weight.dtype}
        stds = {"w1_a": 0.1, "w1_b": 1.0, "w2_a": 0.0, "w2_b": 1.0, "t1": 0.1, "t2": 0.1}
        shapes = _shapes(layer.weight.shape, rank, has_cores and layer.weight.shape[2:].numel() > 1)
        parts = {part: torch.empty(shape, **where).normal_(std=stds[part]) for part, shape in shapes.items()}
        return cls(layer, name, parts, alpha, scale)

    @property
    def rank(self) -> int:
        """That of each of the two matrices."""
        return outer_rank(self.w1_b)

    def direction(self, weight: Tensor) -> Tensor:
        """The product of the two matrices."""
        left_out, left_in, right_out, right_in = self._factors(weight.dtype)
        if self.t1 is None:
            return ((left_out @ left_in) * (right_out @ right_in)).view(weight.shape)
        cores = self._as(weight.dtype, self.t1, self.t2)
        left = torch.einsum("pqhw,po,qi->oihw", cores[0], left_out, left_in)
        return left * torch.einsum("pqhw,po,qi->oihw", cores[1], right_out, right_in)

    def _through_factors(self, x: Tensor, layer: nn.Module) -> Tensor:
        # (A B) * (C D) is of rank r² at most: the product of a way up that has, for each pair of a column of A and one
        # of C, their product, and a way down that has those of the rows of B and D
        left_out, left_in, right_out, right_in = self._factors(x.dtype)
        up = (left_out[:, :, None] * right_out[:, None, :]).flatten(1)
        down = (left_in[:, None, :] * right_in[None, :, :]).reshape(-1, *self.shape[1:])
        h = self.scaled(call_layer(layer, x, down, None))
        return map_channels(layer, h, up)

    @property
    def _multiplications(self) -> float:
        if self.t1 is not None:
            return math.inf  # there is no such way
        return self.rank**2 * (self.shape[0] + self.shape[1:].numel())

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return self._as(dtype, self.w1_a, self.w1_b, self.w2_a, self.w2_b)

    def _problem(self) -> str | None:
        has_cores = self.t1 is not None or self.t2 is not None
        if has_cores and len(self.shape) == 2:
            return "it has the cores of a convolution, and the layer is linear"
        return self._shape_problem(_shapes(self.shape, self.rank, has_cores))


def _shapes(weight: torch.Size, rank: int, has_cores: bool) -> dict[str, tuple[int, ...]]:
    out, inner, kernel = weight[0], weight[1], tuple(weight[2:])
    if has_cores:
        return {
            **{part: (rank, out) for part in ("w1_a", "w2_a")},
            **{part: (rank, inner) for part in ("w1_b", "w2_b")},
            **{part: (rank, rank, *kernel) for part in ("t1", "t2")},
        }
    flat = weight[1:].numel()
    return {"w1_a": (out, rank), "w1_b": (rank, flat), "w2_a": (out, rank), "w2_b": (rank, flat)}
