"""Convolutions over pictures."""

from typing import Literal

import torch
from torch import nn

from refiners.fluxion.layers.module import WeightedModule, single_output

IntPair = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


@single_output
class Conv2d(nn.Conv2d, WeightedModule):
    """A convolution: (B, in_channels, H, W) to (B, out_channels, H', W'); `use_bias` is torch's `bias`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair | str = 0,
        groups: int = 1,
        use_bias: bool = True,
        dilation: IntPair = 1,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=use_bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self.use_bias = use_bias


@single_output
class ConvTranspose2d(nn.ConvTranspose2d, WeightedModule):
    """A transposed convolution: (B, in_channels, H, W) to (B, out_channels, H', W'), larger with a stride above 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair = 0,
        output_padding: IntPair = 0,
        groups: int = 1,
        use_bias: bool = True,
        dilation: IntPair = 1,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            groups=groups,
            bias=use_bias,
            dilation=dilation,  # pyright: ignore[reportArgumentType]  # torch says int and takes a pair
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self.use_bias = use_bias
