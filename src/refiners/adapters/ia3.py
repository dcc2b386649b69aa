"""(IA)^3: scales each output or each input of a layer by a learned number (arXiv 2205.05638, section 3.3)."""

from collections.abc import Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from refiners.adapters.delta import Scale
from refiners.adapters.layer_calls import over_channels
from refiners.adapters.parts_delta import PartsDelta
from refiners.weights.lora_keys.kinds import Kind


class Ia3(PartsDelta):
    """Each output of a linear layer or a convolution, or each input, times a number of its own.

    parts: "weight" and "on_input" as in LyCORIS, where the number is 1 + weight, and the bias stays as it is. weight:
        (n,), for a convolution (1, n, 1, 1); on_input: one number, whether it scales inputs, of which there are n.
        Or "l" as in peft, where the number is l, and outputs are scaled with their bias. l: (out, 1) or (1, in); for a
        convolution (1, n, 1, 1), which is taken for outputs if there are as many of these as of inputs.

    Raises ValueError, with the reason, if these do not fit the layer.
    """

    kind = Kind.IA3
    part_names = ("weight", "l")
    weight: Tensor | None
    on_input: Tensor | None
    l: Tensor | None  # noqa: E741  # the name of the part

    def __init__(self, layer: nn.Module, name: str, parts: Mapping[str, Tensor], scale: Scale = 1.0) -> None:
        super().__init__(name, scale)
        self.register_buffer("on_input", parts.get("on_input"))
        self._take_parts(layer, {part: tensor for part, tensor in parts.items() if part != "on_input"})
        self._axis = self._scaled_axis() or 0
        self.reads_output = self._axis == 0
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
        layer: nn.Linear | nn.Conv2d,
        name: str,
        scale: Scale = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        is_on_input: bool = False,
    ) -> Self:
        """A new update, which scales by 1. device, dtype: those of the layer if not given."""
        where: dict[str, Any] = {"device": device or layer.weight.device, "dtype": dtype or layer.weight.dtype}
        count = layer.weight.shape[1 if is_on_input else 0]
        shape = (count,) if isinstance(layer, nn.Linear) else (1, count, 1, 1)
        on_input = torch.tensor(int(is_on_input), device=where["device"])
        return cls(layer, name, {"weight": torch.zeros(shape, **where), "on_input": on_input}, scale)

    def parts(self) -> dict[str, Tensor]:
        """The tensors by name, as `from_parts` takes them."""
        return super().parts() | ({} if self.on_input is None else {"on_input": self.on_input})

    @property
    def runs_as_weight(self) -> bool:
        """Whether it scales inputs; outputs are scaled as they are."""
        return not self.reads_output

    def direction(self, weight: Tensor) -> Tensor:
        """The weight times the numbers less 1."""
        spread = [1] * weight.ndim
        spread[self._axis] = -1
        return self._change().view(spread) * weight

    def bias_direction(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The bias times the numbers less 1, as in peft."""
        return None if bias is None or self.l is None or self._axis == 1 else self._change() * bias

    def forward(self, x: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
        """As in `Delta`; outputs are scaled without another call of the layer."""
        if not self.reads_output:
            return super().forward(x, output, layer)
        bias = cast("Tensor | None", layer.bias) if self.l is None else None
        scaled = output if bias is None else output - over_channels(layer, bias)
        return self.scaled(over_channels(layer, self._change()) * scaled).to(output.dtype)

    def _change(self) -> Tensor:
        """The numbers less 1: (n,)."""
        numbers = self._numbers.flatten().to(torch.promote_types(self.dtype, torch.float32))
        return numbers if self.l is None else numbers - 1

    @property
    def _numbers(self) -> Tensor:
        return cast(Tensor, self.weight if self.l is None else self.l)

    def _scaled_axis(self) -> int | None:
        """Which axis of the weight is scaled: 0, that of the outputs, or 1; None if the numbers fit neither."""
        is_flat = len(self.shape) == 2 and self.l is None
        for axis, count in enumerate(self.shape[:2]):
            spread = [1] * len(self.shape)
            spread[axis if len(self.shape) == 2 else 1] = count
            if self._numbers.shape == ((count,) if is_flat else tuple(spread)) and self._may_scale(axis):
                return axis
        return None

    def _may_scale(self, axis: int) -> bool:
        return self.on_input is None or self.on_input.is_meta or bool(self.on_input) == bool(axis)

    def _problem(self) -> str | None:
        if (self.l is None) == (self.weight is None):
            return "it should have either a weight or an l"
        if self._scaled_axis() is not None:
            return None
        which = "" if self.on_input is None or self.on_input.is_meta else f" with on_input {int(self.on_input)}"
        return f"its numbers have shape {tuple(self._numbers.shape)}{which}, for a weight of {tuple(self.shape)}"
