"""DoRA: each row of a weight is turned by another update, and gets a length of its own (arXiv 2402.09353, eq. 5)."""

from collections.abc import Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from refiners.adapters.delta import Delta, Scale
from refiners.adapters.layer_calls import over_channels
from refiners.adapters.lora import lora_class
from refiners.adapters.low_rank import Lora
from refiners.weights.lora_keys.kinds import Kind


class Dora(Delta):
    """f(W) = m * V / ||V||, where V is W with the update `inner` added at its own strength.

    inner: a LoRA, LoHa or LoKr, of scale 1; the scale of the whole is the DoRA's.
    magnitude: m, of shape (out,) or (out, 1, ...) for norms over what each output is made of, as in the paper, peft and
        LyCORIS; of shape (1, in, 1, ...) for norms over what each input goes to, as in older files, and of an embedding
        for norms over each entry of all vectors.
    is_norm_constant: whether gradients take ||V|| for a constant, as the paper (section 4.3) and peft do, which saves
        memory and time; LyCORIS does not. The output is the same.

    Raises ValueError if `inner` has another scale than 1.
    """

    kind = Kind.DORA

    def __init__(self, inner: Delta, magnitude: Tensor, scale: Scale = 1.0, is_norm_constant: bool = True) -> None:
        super().__init__(inner.name, scale)
        if inner.scale != 1.0:
            raise ValueError(f"DoRA {inner.name!r}: the update in it has scale {inner.scale}, set that of the DoRA")
        self.inner = inner
        self.magnitude = nn.Parameter(magnitude.detach())
        self.is_norm_constant = is_norm_constant
        self._has_rows = magnitude.ndim == 1 or magnitude.shape[1:].numel() == 1
        has_own_way = not isinstance(inner, Lora) or inner.can_stack([cast("Lora[Any]", inner)])
        self.reads_output = self._has_rows and has_own_way and not inner.runs_as_weight
        self._make_numbers()

    @classmethod
    def around(cls, layer: nn.Linear | nn.Conv2d, inner: Delta, scale: Scale = 1.0) -> Self:
        """A DoRA of a new update for `layer`, which has the lengths of the layer's own rows, so changes nothing yet."""
        weight = layer.weight
        ones = torch.ones(weight.shape[0], *[1] * (weight.ndim - 1), device=inner.device, dtype=inner.dtype)
        dora = cls(inner, ones, scale).checked_for(layer)
        with torch.no_grad():
            dora.magnitude.copy_(dora._norms(weight, inner.delta_weight(weight)))
        return dora

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
        """A DoRA with a new LoRA in it, which changes nothing yet. device, dtype: those of the layer if not given."""
        return cls.around(layer, lora_class(layer).for_layer(layer, name, rank, 1.0, alpha, device, dtype), scale)

    @classmethod
    def from_parts(
        cls, layer: nn.Module, name: str, parts: Mapping[str, Tensor], alpha: float | None = None, scale: Scale = 1.0
    ) -> Self:
        """A DoRA with a LoRA in it: "magnitude", and what makes the LoRA. For other kinds, give the update itself."""
        inner = {part: tensor for part, tensor in parts.items() if part != "magnitude"}
        lora = lora_class(layer).from_parts(layer, name, inner, alpha)
        return cls(lora, parts["magnitude"], scale).checked_for(layer)

    def parts(self) -> dict[str, Tensor]:
        """Those of the update in it, and "magnitude"."""
        return self.inner.parts() | {"magnitude": self.magnitude}

    def misfit(self, layer: nn.Module) -> str | None:
        """Why this update cannot be added to `layer`, or None if it can."""
        if not isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding):
            return f"it updates an embedding, a linear layer or a convolution, not a {type(layer).__name__}"
        shape, (out, inputs) = tuple(self.magnitude.shape), layer.weight.shape[:2]
        if isinstance(layer, nn.Embedding) and shape != (1, inputs):
            return f"its magnitude has shape {shape}, for an embedding of {inputs} entries it should be {(1, inputs)}"
        spread = [1] * (len(shape) - 1)
        if shape not in ((out, *spread), (1, inputs, *spread[1:])) or len(shape) > layer.weight.ndim:
            return f"its magnitude has shape {shape}, which is none for {out} outputs or for {inputs} inputs"
        return self.inner.misfit(layer)

    @property
    def runs_as_weight(self) -> bool:
        """Whether there is no way by the layer's output: lengths of rows scale it, those of columns do not."""
        return not self.reads_output

    def direction(self, weight: Tensor) -> Tensor:
        """f(W) - W, at least in float32: the two are near each other."""
        moved = self.inner.delta_weight(weight)
        ratio = self._ratio(weight, moved)
        ratio = ratio.view(-1, *[1] * (weight.ndim - 1)) if self._has_rows else ratio
        return (ratio - 1) * weight + ratio * moved

    def forward(self, x: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
        """As in `Delta`, from the output W x: with rows r = m / ||V||, it is (r - 1) W x + r (V - W) x."""
        if not self.reads_output:
            return super().forward(x, output, layer)
        weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
        ratio = self._ratio(weight, None)
        has_one_scale = self.factor.ndim == 0
        factor = self.factor if has_one_scale else torch.ones_like(self.factor[0])
        dtype = torch.promote_types(output.dtype, self.inner.dtype)
        product = (output if bias is None else output - over_channels(layer, bias)).to(dtype)
        start = product * over_channels(layer, ((ratio - 1) * factor).to(dtype))
        update = self._add_turned(start, x, output, layer, ratio, factor).to(output.dtype)
        return update if has_one_scale else self.scaled(update)

    def _add_turned(
        self, start: Tensor, x: Tensor, output: Tensor, layer: nn.Module, ratio: Tensor, factor: Tensor
    ) -> Tensor:
        """`start`, and the update of x by `inner` times ratio (out,) and factor ()."""
        if not isinstance(self.inner, Lora):
            return start + over_channels(layer, ratio * factor).to(start.dtype) * self.inner.update(x, output, layer)
        dtype = start.dtype
        down, up = self.inner.factors()
        up = up * ratio.view(-1, *[1] * (up.ndim - 1))
        return self.inner.add_to(
            start, x.to(dtype), down.to(dtype), up.to(dtype), (self.inner.factor * factor).to(dtype)
        )

    def _ratio(self, weight: Tensor, moved: Tensor | None) -> Tensor:
        """What V is multiplied by, m / ||V||: (out,), or (1, in, 1, ...) for lengths of columns."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_norm_constant):
            norms = self._norms(weight, moved)
        return self.magnitude.flatten() / norms.flatten() if self._has_rows else self.magnitude / norms

    def _norms(self, weight: Tensor, moved: Tensor | None) -> Tensor:
        """The lengths of the rows or columns of V = W + moved, in the shape of the magnitude, at least in float32.

        moved: None for the update in this one as it is now, which a LoRA does not need to be multiplied out for.
        """
        dtype = torch.promote_types(torch.float32, weight.dtype)
        weight = weight.to(dtype)
        if moved is None and isinstance(self.inner, Lora):
            squares = self._squares_of_rows(weight.flatten(1))
        else:
            whole = weight + (self.inner.delta_weight(weight) if moved is None else moved)
            rows = whole if self._has_rows else whole.transpose(0, 1)
            squares = _squares(rows.flatten(1))
        return squares.clamp_min(torch.finfo(dtype).tiny).sqrt().view(self.magnitude.shape)

    def _squares_of_rows(self, weight: Tensor) -> Tensor:
        """||w + u D||² = ||w||² + (2 w Dᵀ + u D Dᵀ) · u for rows w of W and u of the way up, with no product u D.

        Where u D takes nearly all of w away, few digits are left of it.
        """
        inner = cast("Lora[Any]", self.inner)
        down, up = (part.flatten(1).to(weight.dtype) for part in inner.factors())
        up = up * inner.factor
        return _squares(weight) + (up * (2 * (down @ weight.mT).mT + up @ (down @ down.mT))).sum(1)


def _squares(rows: Tensor) -> Tensor:
    """The squared length of each row. In one pass: the square of all numbers would be as large as the weight."""
    return cast(Tensor, torch.linalg.vector_norm(rows, dim=1)).square()
