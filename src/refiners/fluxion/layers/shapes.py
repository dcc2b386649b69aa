"""Layers that change shapes, or take parts of a tensor. Shapes given to a constructor leave out the batch dimension."""

import torch
from torch import Size, Tensor

from refiners.fluxion.layers.module import Module, single_output


@single_output
class Reshape(Module):
    """(B, ...) to (B, *shape), copying if it must."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.shape)

    def extra_repr(self) -> str:
        return f"shape={self.shape}"


@single_output
class View(Module):
    """Any shape to `shape`, batch included, without a copy."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.view(*self.shape)

    def extra_repr(self) -> str:
        return f"shape={self.shape}"


@single_output
class Flatten(Module):
    """Join the dimensions from `start_dim` to `end_dim` into one."""

    def __init__(self, start_dim: int = 0, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim = start_dim
        self.end_dim = end_dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(x, start_dim=self.start_dim, end_dim=self.end_dim)

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"


@single_output
class Unflatten(Module):
    """Split dimension `dim` into the sizes of the second input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, sizes: Size) -> Tensor:
        return torch.unflatten(x, dim=self.dim, sizes=sizes)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


@single_output
class Transpose(Module):
    """Swap two dimensions."""

    def __init__(self, dim0: int, dim1: int) -> None:
        super().__init__()
        self.dim0 = dim0
        self.dim1 = dim1

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(self.dim0, self.dim1)

    def extra_repr(self) -> str:
        return f"dim0={self.dim0}, dim1={self.dim1}"


@single_output
class Permute(Module):
    """Reorder all dimensions."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(*self.dims)

    def extra_repr(self) -> str:
        return f"dims={self.dims}"


@single_output
class Squeeze(Module):
    """Drop dimension `dim` if its size is 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


@single_output
class Unsqueeze(Module):
    """Add a dimension of size 1 at `dim`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


@single_output
class Slicing(Module):
    """The part `x[start:end:step]` along `dim`; negative bounds count from the end, `end=None` is the end."""

    def __init__(self, dim: int = 0, start: int = 0, end: int | None = None, step: int = 1) -> None:
        super().__init__()
        if step < 1:
            raise ValueError(f"Slicing takes a step of at least 1, not {step}")
        self.dim = dim
        self.start = start
        self.end = end
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        if not -x.ndim <= self.dim < x.ndim:
            raise IndexError(f"Slicing along dimension {self.dim} does not go with a tensor of shape {tuple(x.shape)}")
        before = [slice(None)] * (self.dim % x.ndim)
        return x[(*before, slice(self.start, self.end, self.step))]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, start={self.start}, end={self.end}, step={self.step}"
