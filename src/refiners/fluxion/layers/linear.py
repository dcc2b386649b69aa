"""Linear maps of the last dimension."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from refiners.fluxion.context import placed
from refiners.fluxion.layers.activations import ReLU
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.lean import can_run_frozen, run_frozen
from refiners.fluxion.layers.module import WeightedModule, single_output

# oneDNN's product, which torch takes of its own for half precision only. On an AMD CPU it took 0.8 to 0.95 of the time
# of MKL's, at 16 to 2048 rows of 320 to 5120 features. It knows no gradients. None where torch was built without it.
_ONEDNN: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
FEWEST_FEATURES = 256  # with fewer, to choose costs more than it saves


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W^T + b; in single precision on a CPU, where no gradient is wanted, by a faster kernel than torch's."""
    if (
        torch.is_grad_enabled()
        or x.__class__ is not Tensor
        or x.dtype != torch.float32
        or not x.is_cpu
        or x.ndim < 2
        or weight.dtype != torch.float32
        or weight.__class__ not in (Tensor, nn.Parameter)
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
        or _ONEDNN is None
    ):
        return linear(x, weight, bias)
    return _ONEDNN(x, weight, bias, "none", [], "")


def _gradient(gradient: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
    return product(gradient, weight.t(), None)


@single_output
class Linear(nn.Linear, WeightedModule):
    """x W^T + b: (..., in_features) to (..., out_features)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """As in torch; on the meta device nothing is done, as there are no values and torch is slow to give none."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        # `self.weight` is a failed look-up and a call of torch's __getattr__, as dear as the rest of a small layer
        try:
            weight, bias = self._parameters["weight"], self._parameters["bias"]
        except KeyError:  # computed from other parameters (torch.nn.utils.parametrize)
            return super().forward(input)
        if self.in_features >= FEWEST_FEATURES and input.is_cpu and can_run_frozen(input, weight, bias):  # pyright: ignore[reportArgumentType]
            return run_frozen(input, weight, self._multiply, _gradient)  # pyright: ignore[reportArgumentType]
        return self.multiply(input, weight, bias)  # pyright: ignore[reportArgumentType]

    def multiply(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What this layer returns with another weight (out, in) and bias (out,): (..., in) to (..., out)."""
        if self.in_features < FEWEST_FEATURES:
            return linear(input, weight, bias)
        return product(input, weight, bias)

    def _multiply(self, input: Tensor) -> Tensor:
        return self.multiply(input, self.weight, self.bias)


class MultiLinear(Chain):
    """A multilayer perceptron: `num_layers` linear layers with ReLU between them.

    (..., input_dim) to (..., output_dim), by way of inner_dim.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        inner_dim: int,
        num_layers: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_layers < 1:
            raise ValueError(f"MultiLinear needs at least 1 layer, not {num_layers}")
        dims = [input_dim, *[inner_dim] * (num_layers - 1), output_dim]
        with placed(device, dtype):
            layers = [layer for pair in itertools.pairwise(dims) for layer in (Linear(*pair), ReLU())]
        super().__init__(layers[:-1])
