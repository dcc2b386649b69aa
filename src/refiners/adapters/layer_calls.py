"""Runs a layer with other tensors in the place of its own weight and bias."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from refiners.fluxion.layers.conv import Conv2d
from refiners.fluxion.layers.linear import Linear
from refiners.fluxion.layers.norm import LayerNorm2d

CALLABLE = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm, LayerNorm2d)


def call_layer(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `layer` would return for `x` if `weight` and `bias` were its own. Its hooks are not called.

    Raises TypeError if it is none of `CALLABLE`.
    """
    found: Any = layer
    match found:
        case Linear():
            return found.multiply(x, weight, bias)
        case nn.Linear():
            return F.linear(x, weight, bias)
        case Conv2d():
            return found.convolve(x, weight, bias)
        case nn.Conv2d():
            return found._conv_forward(x, weight, bias)
        case nn.Embedding():
            return F.embedding(x, weight, found.padding_idx)
        case nn.LayerNorm():
            return F.layer_norm(x, found.normalized_shape, weight, bias, found.eps)
        case nn.GroupNorm():
            return F.group_norm(x, found.num_groups, weight, bias, found.eps)
        case LayerNorm2d():
            return F.layer_norm(x.movedim(1, -1), (found.channels,), weight, bias, found.eps).movedim(-1, 1)
        case _:
            raise TypeError(f"a {type(found).__name__} cannot be run with another weight")


def over_channels(layer: nn.Module, values: Tensor) -> Tensor:
    """One value per output channel (out,) in a shape that multiplies or adds to what `layer` returns."""
    return values.view(-1, 1, 1) if isinstance(layer, nn.Conv2d | nn.GroupNorm | LayerNorm2d) else values
