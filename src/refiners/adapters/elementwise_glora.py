"""GLoRA as peft has it: each value of the weight and of the bias scaled and shifted (arXiv 2306.07967)."""

import math
from collections.abc import Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from refiners.adapters.delta import Scale
from refiners.adapters.factored import check_rank
from refiners.adapters.parts_delta import PartsDelta
from refiners.weights.lora_keys.kinds import Kind

_PATHS = ("A", "B", "C", "D", "E")


class ElementwiseGlora(PartsDelta):
    """W + scale * (W ∘ A + B) and b + scale * (b ∘ D + E + W C) of a linear layer, ∘ value by value.

    parts: of A to E those that are not zero, each whole (`A_X`) or as a product (`A_Xd` times `A_Xu`):
        A and B as (out, rank) and (rank, in), or (out, 1), or (1,) for one number;
        C as (in, rank) and (rank, 1), or (in, 1);
        D and E as (out,) or (1,). Only a layer with a bias has C, D and E.

    Raises ValueError, with the reason, if these do not fit the layer.
    """

    kind = Kind.ELEMENTWISE_GLORA
    part_names = tuple(f"{path}_{form}" for path in _PATHS for form in ("X", "Xd", "Xu"))

    def __init__(self, layer: nn.Module, name: str, parts: Mapping[str, Tensor], scale: Scale = 1.0) -> None:
        super().__init__(name, scale)
        self._take_parts(layer, parts)
        self.checked_for(layer)
        self._make_numbers()

    @classmethod
    def from_parts(
        cls, layer: nn.Module, name: str, parts: Mapping[str, Tensor], alpha: float | None = None, scale: Scale = 1.0
    ) -> Self:
        """As the constructor; alpha has no use."""
        return cls(layer, name, parts, scale)

    @classmethod
    def for_layer(
        cls,
        layer: nn.Linear,
        name: str,
        rank: int = 8,
        scale: Scale = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A new update, which is zero at first: products for A, B and C, one number each for D and E.

        device, dtype: those of the layer if not given. Raises ValueError if the rank is less than 1.
        """
        check_rank(rank)
        where: dict[str, Any] = {"device": device or layer.weight.device, "dtype": dtype or layer.weight.dtype}
        out, inner = layer.weight.shape
        shapes = {"A_Xd": (out, rank), "A_Xu": (rank, inner), "B_Xd": (out, rank), "B_Xu": (rank, inner)}
        if layer.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]  # torch's type leaves None out
            shapes |= {"C_Xd": (inner, rank), "C_Xu": (rank, 1), "D_X": (1,), "E_X": (1,)}
        parts = {part: torch.zeros(shape, **where) for part, shape in shapes.items()}
        for part, tensor in parts.items():
            if part.endswith("u"):
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        return cls(layer, name, parts, scale)

    def misfit(self, layer: nn.Module) -> str | None:
        """Why this update cannot be added to `layer`, or None if it can."""
        of_bias = [part for part in self.parts() if part[0] in "CDE"]
        if of_bias and getattr(layer, "bias", None) is None:
            return f"it has {of_bias[0]}, which changes the bias, and the layer has none"
        return super().misfit(layer)

    def direction(self, weight: Tensor) -> Tensor | None:
        """W ∘ A + B, or None if it has neither."""
        factor, shift = self._value("A", weight.dtype), self._value("B", weight.dtype)
        if factor is None:
            return None if shift is None else shift.expand(weight.shape)
        scaled = weight * factor
        return scaled if shift is None else scaled + shift

    def bias_direction(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The sum b ∘ D + E + W C, or None if it has none of the three."""
        if bias is None:
            return None
        factor, shift, mixed = (self._value(path, weight.dtype) for path in "DEC")
        terms = [
            None if factor is None else bias * factor,
            None if shift is None else shift.expand(bias.shape),
            None if mixed is None else (weight.to(mixed.dtype) @ mixed).squeeze(-1),
        ]
        there = [term for term in terms if term is not None]
        return sum(there[1:], there[0]) if there else None

    def _value(self, path: str, dtype: torch.dtype) -> Tensor | None:
        """One of A to E in a number format that holds both its own and `dtype`."""
        parts = (cast("Tensor | None", getattr(self, f"{path}_{form}")) for form in ("X", "Xd", "Xu"))
        found = self._as(dtype, *parts)
        return None if not found else found[0] if len(found) == 1 else found[0] @ found[1]

    def _problem(self) -> str | None:
        if len(self.shape) != 2:
            return "it updates a linear layer, not a convolution"
        if not self.parts():
            return "it has no parts"
        out, inner = self.shape
        whole = {"C": [(inner, 1)], "D": [(out,), (1,)]}
        whole |= {"A": [(out, 1), (1,)], "B": [(out, 1), (1,)], "E": whole["D"]}
        products = {"A": (out, inner), "B": (out, inner), "C": (inner, 1)}
        parts = self.parts()
        for path in _PATHS:
            own = {part: tuple(tensor.shape) for part, tensor in parts.items() if part.startswith(path)}
            down, up = own.get(f"{path}_Xd", ()), own.get(f"{path}_Xu", ())
            is_product = len(own) == len(down) == len(up) == 2 and down[1] == up[0]
            if (
                own
                and own not in [{f"{path}_X": shape} for shape in whole[path]]
                and not (is_product and (down[0], up[1]) == products.get(path))
            ):
                shapes = ", ".join(f"{part} {shape}" for part, shape in own.items())
                return f"its {shapes} make up no {path} for a weight of {(out, inner)}"
        return None
