"""Layers that compute each element alone, without weights."""

import torch
from torch import Tensor

from refiners.fluxion.layers.module import Module, single_output


@single_output
class Multiply(Module):
    """scale * x + bias, for two numbers."""

    def __init__(self, scale: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.bias

    def extra_repr(self) -> str:
        return f"scale={self.scale}, bias={self.bias}"


@single_output
class Sin(Module):
    """The sine, of radians."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


@single_output
class Cos(Module):
    """The cosine, of radians."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(x)
