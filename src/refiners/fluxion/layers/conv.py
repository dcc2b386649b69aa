"""Convolutions over pictures."""

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from refiners.fluxion.layers.module import WeightedModule, single_output

IntPair = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

# On a CPU, oneDNN brings the weights into its own order at each call, which for many weights and few positions takes
# longer than the convolution. As a matrix product, 1280 channels took 7 ms rather than 49 at 1x1, 54 rather than 89 at
# 8x8 (batch 2, kernel 3), and as long at 16x16.
MOST_POSITIONS, FEWEST_WEIGHTS = 256, 2**20


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

    def reset_parameters(self) -> None:
        """As in torch; on the meta device nothing is done, as there are no values and torch is slow to give none."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if weight.device.type == "cpu" and weight.numel() >= FEWEST_WEIGHTS and self._is_faster_as_product(input):
            return self._product(input)
        return super().forward(input)

    def _is_faster_as_product(self, input: Tensor) -> bool:
        return (
            input.ndim == 4
            and input.shape[0] * input.shape[2] * input.shape[3] <= MOST_POSITIONS
            and input.dtype == self.weight.dtype == torch.float32
            and self.kernel_size != (1, 1)
            and self.groups == 1
            and self.padding_mode == "zeros"
            and isinstance(self.padding, tuple)
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
        )

    def _product(self, input: Tensor) -> Tensor:
        """The convolution as one product of all its windows, (B * H' * W', in_channels * kernel), with the weights."""
        padding = cast("tuple[int, int]", self.padding)
        height, width = (
            (input.shape[2 + axis] + 2 * padding[axis] - self.dilation[axis] * (self.kernel_size[axis] - 1) - 1)
            // self.stride[axis]
            + 1
            for axis in (0, 1)
        )
        windows = functional.unfold(input, self.kernel_size, self.dilation, padding, self.stride).transpose(1, 2)
        output = functional.linear(windows, self.weight.flatten(1), self.bias)
        return output.transpose(1, 2).contiguous().reshape(input.shape[0], self.out_channels, height, width)


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
