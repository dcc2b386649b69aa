"""How strong what an adapter adds is, as a layer: a number, or one for each sample, that can be changed at any time."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from refiners.adapters.delta import Scale, checked_scale, for_batch, shown
from refiners.fluxion.layers.module import Module, shell_copy, single_output


@single_output
class Scaling(Module):
    """x times a scale: (B, ...) to the same shape.

    scale: any finite number, or one for each sample of a batch; see `scale`.
    """

    factor: Tensor  # (), or (n,) for n samples; float32: a buffer, so that a new scale needs no new compilation

    def __init__(self, scale: Scale = 1.0) -> None:
        super().__init__()
        self._scale = checked_scale(scale)
        self.register_buffer("factor", torch.tensor(self._scale, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factor.to(x.dtype)
        return x * (factor if factor.ndim == 0 else for_batch(factor, x))

    @property
    def scale(self) -> float | tuple[float, ...]:
        """The scale; several numbers are for the samples of a batch in turn, again from the first after the last."""
        return self._scale

    @scale.setter
    def scale(self, value: Scale) -> None:
        self._scale = checked_scale(value)
        factor = torch.tensor(self._scale, dtype=torch.float32, device=self.factor.device)
        if self.factor.is_inference() or self.factor.shape != factor.shape:
            self._buffers["factor"] = factor
        else:
            self.factor.copy_(factor)

    def structural_copy(self) -> Self:
        """Return a copy with a scale of its own."""
        clone = shell_copy(self)
        clone._buffers["factor"] = self.factor.clone()
        return clone

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        probe = torch.empty(0, device="cpu" if self.factor.is_meta else self.factor.device)
        self._buffers["factor"] = torch.tensor(self._scale, dtype=torch.float32, device=fn(probe).device)
        return self

    def extra_repr(self) -> str:
        return f"scale={shown(self._scale)}"
