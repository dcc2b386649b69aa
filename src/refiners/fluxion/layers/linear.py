"""Linear maps of the last dimension."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from refiners.fluxion.context import placed
from refiners.fluxion.layers.activations import ReLU
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.module import WeightedModule, single_output


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
        return linear(input, weight, bias)  # pyright: ignore[reportArgumentType]


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
