"""Normalisation layers."""

import torch
from torch import Tensor, nn

from refiners.fluxion.layers.module import Module, WeightedModule, single_output


@single_output
class LayerNorm(nn.LayerNorm, WeightedModule):
    """Normalise over the last dimensions, of sizes `normalized_shape`, then scale and shift (arXiv 1607.06450)."""

    def __init__(
        self,
        normalized_shape: int | list[int],
        eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps=eps, bias=bias, device=device, dtype=dtype)


@single_output
class GroupNorm(nn.GroupNorm, WeightedModule):
    """Normalise (B, channels, ...) over the channels of each group and all positions (arXiv 1803.08494)."""

    def __init__(
        self,
        channels: int,
        num_groups: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_groups, channels, eps=eps, affine=True, device=device, dtype=dtype)
        self.channels = channels


@single_output
class LayerNorm2d(WeightedModule):
    """Normalise (B, channels, H, W) over the channels at each position, as Segment Anything's convolutions need it."""

    def __init__(
        self,
        channels: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        last = x.movedim(1, -1)
        return nn.functional.layer_norm(last, (self.channels,), self.weight, self.bias, self.eps).movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"


@single_output
class InstanceNorm2d(nn.InstanceNorm2d, Module):
    """Normalise (B, num_features, H, W) over the positions of each channel (arXiv 1607.08022); holds no weight."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, device=device, dtype=dtype)


@single_output
class RMSNorm(nn.RMSNorm, WeightedModule):
    """Divide by the root mean square over the last dimensions, then scale (arXiv 1910.07467)."""

    def __init__(
        self,
        normalized_shape: int | list[int],
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps=eps, device=device, dtype=dtype)
