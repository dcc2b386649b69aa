"""A stored tensor as a layer: learned (`Parameter`) or not (`Buffer`)."""

import torch
from torch import Tensor, nn

from refiners.fluxion.layers.module import WeightedModule, single_output


@single_output
class Parameter(WeightedModule):
    """Gives its weight, of shape `dims`, once per sample: (B, ...) to (B, *dims). Starts standard normal."""

    def __init__(
        self,
        *dims: int,
        requires_grad: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dims = dims
        self.weight = nn.Parameter(torch.randn(dims, device=device, dtype=dtype), requires_grad=requires_grad)

    @property
    def requires_grad(self) -> bool:
        """Whether the weight is trained."""
        return self.weight.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.weight.requires_grad_(value)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.expand(x.shape[0], *self.dims)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.dims))


@single_output
class Buffer(WeightedModule):
    """As `Parameter`, for a tensor that is saved and moved with the model but never trained."""

    def __init__(
        self,
        *dims: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dims = dims
        self.register_buffer("weight", torch.randn(dims, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.expand(x.shape[0], *self.dims)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.dims))
