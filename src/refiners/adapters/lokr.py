"""LoKr: the Kronecker product of two small matrices, the second with the kernel of a convolution (arXiv 2309.14859)."""

import math
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from refiners.adapters.delta import Scale
from refiners.adapters.factored import FactoredDelta, check_rank, map_channels, outer_rank
from refiners.adapters.layer_calls import call_layer
from refiners.weights.lora_keys.kinds import Kind

Form = Literal["whole", "product", "core"]  # in which w2 comes


class Lokr(FactoredDelta):
    """W + scale * (alpha / rank) * (w1 ⊗ w2), of a linear layer or a convolution.

    w1: (o1, i1), or the product of w1_a (o1, rank) and w1_b (rank, i1).
    w2: (o2, i2), for a convolution (o2, i2, height, width); or the product of w2_a (o2, rank) and w2_b (rank, i2), for
        a convolution (rank, i2 * height * width); or a Tucker decomposition of core t2 (rank, rank, height, width),
        w2_a (rank, o2) and w2_b (rank, i2). o1 * o2 are the outputs of the layer, i1 * i2 its inputs.

    If both are whole, there is no rank, and alpha has no effect, as in LyCORIS and ComfyUI; peft has one in its
    settings all the same, and multiplies by alpha / rank.
    """

    kind = Kind.LOKR
    part_names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    # Products of such small matrices run at a third of the speed of others. 160 features at rank 8 took 1.0 times the
    # training step of a LoRA as a weight, 1.2 through the factors (256 rows on one CPU); 320 took 1.2 and 1.1.
    largest_share: ClassVar[float] = 1 / 9
    w1: Tensor | None
    w1_a: Tensor | None
    w1_b: Tensor | None
    w2: Tensor | None
    w2_a: Tensor | None
    w2_b: Tensor | None
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
        factor: int | None = None,
        has_core: bool = False,
    ) -> Self:
        """A new update, which is zero at first: `w2_b` is, or `w2`, which is whole where the rank is half of it.

        device, dtype: those of the layer if not given.
        factor: the most rows and columns that w1 may have; as near to those of w2 as may be if not given.
        has_core: whether w2 is a Tucker decomposition, if the layer has a kernel of more than one element.
        Raises ValueError if the rank or the factor is less than 1.
        """
        check_rank(rank)
        where: dict[str, Any] = {"device": device or layer.weight.device, "dtype": dtype or layer.weight.dtype}
        out, inner, *kernel = layer.weight.shape
        first = (_divisor(out, factor), _divisor(inner, factor))
        second = (out // first[0], inner // first[1])
        form: Form = "whole" if 2 * rank >= max(second) else "core" if has_core and math.prod(kernel) > 1 else "product"
        shapes = {"w1": first, **_second_shapes(form, second, rank, tuple(kernel))}
        parts = {part: torch.empty(shape, **where) for part, shape in shapes.items()}
        for part, tensor in parts.items():
            if part in ("w2", "w2_b"):
                tensor.zero_()
            else:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        return cls(layer, name, parts, alpha, scale)

    @property
    def rank(self) -> int:
        """The inner dimension of what is a product; 1 if nothing is."""
        return outer_rank(self.w2_b) or outer_rank(self.w1_b) or 1

    @property
    def gain(self) -> float:
        """The alpha over the rank; 1 if there is no rank."""
        return 1.0 if self.w1_b is None and self.w2_b is None else super().gain

    def direction(self, weight: Tensor) -> Tensor:
        """The Kronecker product."""
        first, (down, up) = self._first(weight.dtype), self._ways(weight.dtype)
        second = down if up is None else torch.einsum("or,ri...->oi...", up, down)
        # not torch.kron, which the compiler cannot follow if the second matrix is no contiguous one
        blocks = first[:, None, :, None, None] * second.reshape(*second.shape[:2], -1)[None, :, None]
        return blocks.reshape(weight.shape)

    def _through_factors(self, x: Tensor, layer: nn.Module) -> Tensor:
        first = self._first(x.dtype)
        if self.has_one_scale:
            return self._product(x, self.scaled(first), layer)
        return self.scaled(self._product(x, first, layer))

    def _product(self, x: Tensor, first: Tensor, layer: nn.Module) -> Tensor:
        """(w1 ⊗ w2) x: of inputs in i1 rows and i2 columns, w2 acts along the rows, w1 along the columns.

        Where w2 is a product, w1 comes before the way up, as there are the fewest numbers then.
        """
        down, up = self._ways(x.dtype)
        places = len(self.shape) - 2  # dimensions behind the channels
        rows = x.reshape(-1, down.shape[1], *x.shape[x.ndim - places :])
        rows = call_layer(layer, rows, down, None)
        tables = rows.reshape(-1, first.shape[1], rows.shape[1:].numel())
        mixed = first @ tables.transpose(0, 1).flatten(1)
        mixed = mixed.view(len(first), len(tables), *rows.shape[1:]).transpose(0, 1).flatten(0, 1)
        if up is not None:
            mixed = map_channels(layer, mixed, up)
        return mixed.reshape(*x.shape[: -1 - places], self.shape[0], *mixed.shape[2:])

    def _first(self, dtype: torch.dtype) -> Tensor:
        """w1, whole."""
        factors = self._as(dtype, self.w1, self.w1_a, self.w1_b)
        return factors[0] if len(factors) == 1 else factors[0] @ factors[1]

    def _ways(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """w2 as what leads down to the rank, (rank, i2, ...) with the kernel, and up, (o2, rank).

        If it is whole, all of it leads down.
        """
        kernel = self.shape[2:]
        if self.w2 is not None:
            (whole,) = self._as(dtype, self.w2)
            return whole.reshape(*whole.shape[:2], *kernel), None
        if self.t2 is not None:
            up, down, core = self._as(dtype, self.w2_a, self.w2_b, self.t2)
            return torch.einsum("pqhw,qi->pihw", core, down), up.T
        up, down = self._as(dtype, self.w2_a, self.w2_b)
        return down.reshape(self.rank, -1, *kernel), up

    @property
    def _first_sizes(self) -> tuple[int, int]:
        """(o1, i1)."""
        left, right = (self.w1_a, self.w1_b) if self.w1 is None else (self.w1, self.w1)
        assert left is not None and right is not None, "parts are checked first"
        return left.shape[0], right.shape[1]

    @property
    def _multiplications(self) -> float:
        (o1, i1), flat = self._first_sizes, self.shape[1:].numel()
        o2 = self.shape[0] // o1
        if self.w2_b is None:
            return o2 * flat + o1 * i1 * o2
        return self.rank * (flat + o1 * i1 + o1 * o2)

    def _problem(self) -> str | None:
        for whole, *factors in (("w1", "w1_a", "w1_b"), ("w2", "w2_a", "w2_b", "t2")):
            found = [part for part in factors if getattr(self, part) is not None]
            if getattr(self, whole) is not None and found:
                return f"it has both {whole} and {found[0]}, which is a factor of it"
            if getattr(self, whole) is None and factors[:2] != found[:2]:
                return f"it has neither {whole} nor both of {factors[0]} and {factors[1]}"
        flat = [part for part, tensor in self.parts().items() if tensor.ndim < 2]
        if flat:
            return f"its {flat[0]} is no matrix"
        (o1, i1), (out, inner, *kernel) = self._first_sizes, self.shape
        if self.t2 is not None and not kernel:
            return "it has the core of a convolution, and the layer is linear"
        if out % max(o1, 1) or inner % max(i1, 1):
            return f"its first matrix is {o1} by {i1}, which do not divide the {out} and {inner} of the layer"
        second = (out // o1, inner // i1)
        form: Form = "whole" if self.w2 is not None else "product" if self.t2 is None else "core"
        if self.w2 is not None and math.prod(kernel) == 1 and self.w2.shape[2:] in ((), (1, 1)):
            kernel = self.w2.shape[2:]  # the same, whether the layer is linear or a convolution
        first = {"w1": (o1, i1)} if self.w1 is not None else {"w1_a": (o1, self.rank), "w1_b": (self.rank, i1)}
        return self._shape_problem(first | _second_shapes(form, second, self.rank, tuple(kernel)))


def _second_shapes(
    form: Form, sizes: tuple[int, int], rank: int, kernel: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """The shapes of w2 or what it is made of."""
    out, inner = sizes
    if form == "whole":
        return {"w2": (out, inner, *kernel)}
    if form == "core":
        return {"w2_a": (rank, out), "w2_b": (rank, inner), "t2": (rank, rank, *kernel)}
    return {"w2_a": (out, rank), "w2_b": (rank, inner * math.prod(kernel))}


def _divisor(size: int, most: int | None) -> int:
    """The largest divisor of a size that is neither above its square root nor above `most`."""
    if most is not None and most < 1:
        raise ValueError(f"the factor of a LoKr must be at least 1, not {most}")
    largest = math.isqrt(size) if most is None else min(most, math.isqrt(size))
    return next(divisor for divisor in range(largest, 0, -1) if size % divisor == 0)
