"""Full differences, and whole weights: updates as large as the weight and the bias of a layer themselves."""

from collections.abc import Mapping
from typing import Any, Self, cast

from torch import Tensor, nn

from refiners.adapters.delta import Delta, Scale
from refiners.adapters.layer_calls import CALLABLE
from refiners.weights.lora_keys.kinds import Kind


class Difference(Delta):
    """W + scale * weight and b + scale * bias, of a linear layer, a convolution, an embedding or a norm.

    weight, bias: in the shapes of the layer's; either may be left out. A layer without a bias gets one.
    Raises ValueError if both are left out.
    """

    kind = Kind.DIFFERENCE
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, name: str, /, weight: Tensor | None, bias: Tensor | None = None, scale: Scale = 1.0) -> None:
        super().__init__(name, scale)
        if weight is None and bias is None:
            raise ValueError(f"full difference {name!r}: there is neither a weight nor a bias")
        self.weight = None if weight is None else nn.Parameter(weight.detach())
        self.bias = None if bias is None else nn.Parameter(bias.detach())
        self._make_numbers()

    @classmethod
    def from_parts(
        cls, layer: nn.Module, name: str, parts: Mapping[str, Tensor], alpha: float | None = None, scale: Scale = 1.0
    ) -> Self:
        """A difference of "weight", "bias" or both; alpha has no use."""
        return cls(name, parts.get("weight"), parts.get("bias"), scale).checked_for(layer)

    def parts(self) -> dict[str, Tensor]:
        """As `from_parts` takes them: "weight" and "bias", as far as they are there."""
        found = {"weight": self.weight, "bias": self.bias}
        return {part: tensor for part, tensor in found.items() if tensor is not None}

    def misfit(self, layer: nn.Module) -> str | None:
        """Why this update cannot be added to `layer`, or None if it can."""
        if not isinstance(layer, CALLABLE):
            return f"it updates a layer with a weight, not a {type(layer).__name__}"
        target: Any = layer
        if self.weight is not None and self.weight.shape != target.weight.shape:
            return f"its weight has shape {tuple(self.weight.shape)}, that of the layer {tuple(target.weight.shape)}"
        if self.bias is None:
            return None
        if isinstance(layer, nn.Embedding):
            return "it has a bias, and an embedding has none"
        outputs = cast(Tensor, target.weight).shape[:1]
        return (
            None if self.bias.shape == outputs else f"its bias has shape {tuple(self.bias.shape)}, not {tuple(outputs)}"
        )

    def direction(self, weight: Tensor) -> Tensor | None:
        """The difference of the weight."""
        return self.weight

    def bias_direction(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The difference of the bias."""
        return self.bias


class Replacement(Difference):
    """A weight and a bias in the place of the layer's own: W + scale * (weight - W), b + scale * (bias - b).

    weight, bias: as in `Difference`.
    """

    kind = Kind.WHOLE

    def direction(self, weight: Tensor) -> Tensor | None:
        """What leads from the layer's weight to this one."""
        return None if self.weight is None else self.weight - weight

    def bias_direction(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """What leads from the layer's bias, zero if it has none, to this one."""
        return self.bias if self.bias is None or bias is None else self.bias - bias
