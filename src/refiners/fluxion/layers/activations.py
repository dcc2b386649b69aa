"""Activation functions."""

from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from refiners.fluxion.layers.lean import gelu_gated
from refiners.fluxion.layers.module import Module, single_output


class Activation(Module):
    """What all activation functions are: one tensor in, one of the same shape out (GLU halves the last dimension)."""


@single_output
class SiLU(Activation):
    """x * sigmoid(x) (arXiv 1702.03118, also called swish)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


@single_output
class ReLU(Activation):
    """max(x, 0)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


@single_output
class Sigmoid(Activation):
    """1 / (1 + exp(-x))."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


class GeLUApproximation(Enum):
    """How `GeLU` computes x * Phi(x): exactly, by tanh, or by a sigmoid (arXiv 1606.08415, section 2)."""

    NONE = "none"
    TANH = "tanh"
    SIGMOID = "sigmoid"


@single_output
class GeLU(Activation):
    """x * Phi(x), where Phi is the distribution function of a standard normal variable (arXiv 1606.08415).

    CLIP's "quick GELU" is `GeLUApproximation.SIGMOID`: x * sigmoid(1.702 x).
    """

    def __init__(self, approximation: GeLUApproximation = GeLUApproximation.NONE) -> None:
        super().__init__()
        self.approximation = GeLUApproximation(approximation)

    def forward(self, x: Tensor) -> Tensor:
        if self.approximation is GeLUApproximation.SIGMOID:
            return x * (1.702 * x).sigmoid_()
        return F.gelu(x, approximate=self.approximation.value)

    def extra_repr(self) -> str:
        return "" if self.approximation is GeLUApproximation.NONE else f"approximation={self.approximation.value!r}"


@single_output
class GLU(Activation):
    """Gated linear unit (arXiv 2002.05202, section 2): (..., 2 d) to (..., d), the first half times f(second half)."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            raise ValueError(f"GLU halves the last dimension, which must be even, but got shape {tuple(x.shape)}")
        if torch.is_grad_enabled() and x.requires_grad and self._has_plain_gelu():
            return gelu_gated(x, self.activation.approximation.value)
        output, gate = x.chunk(2, dim=-1)
        return output * self.activation(gate)

    def _has_plain_gelu(self) -> bool:
        gelu = self.activation
        return (
            type(gelu) is GeLU
            and gelu.approximation is not GeLUApproximation.SIGMOID
            and not (gelu._forward_hooks or gelu._forward_pre_hooks or gelu._backward_hooks)
            and not torch.compiler.is_compiling()
        )
