"""Convolutions over pictures."""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn import grad as layer_gradients

from refiners.fluxion.layers import winograd
from refiners.fluxion.layers.lean import can_run_frozen, run_frozen
from refiners.fluxion.layers.linear import product
from refiners.fluxion.layers.module import WeightedModule, single_output

IntPair = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

# On a CPU, oneDNN brings the weights into its own order at each call, which for many weights and few positions takes
# longer than the convolution. As a matrix product, 1280 channels took 7 ms rather than 49 at 1x1, 54 rather than 89 at
# 8x8 (batch 2, kernel 3), and longer at 16x16.
MOST_POSITIONS, FEWEST_WEIGHTS = 128, 2**20
# With many positions Winograd's way is faster: 118 ms rather than 173 for 512 channels at 64x64, 25 rather than 34 for
# 320 at 32x32, 29 rather than 35 for 640 at 16x16 (batch 2). With fewer, to transform the weights takes what it saves.
WINOGRAD_POSITIONS, WINOGRAD_CHANNELS = 512, 128


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
        if input.ndim == 4 and can_run_frozen(input, self.weight, self.bias) and self._has_plain_padding():
            return run_frozen(input, self.weight, self._convolve, self._gradient)
        return self._convolve(input)

    def convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What this layer returns with another weight and bias, of as many or other channels.

        input (B, C, H, W), weight (K, C, *kernel_size), bias (K,): (B, K, H', W').
        """
        if input.is_cpu and input.ndim == 4 and input.dtype == weight.dtype and self._is_plain(weight.dtype):
            positions = input.shape[0] * input.shape[2] * input.shape[3]
            if positions <= MOST_POSITIONS and weight.numel() >= FEWEST_WEIGHTS:
                return self._product(input, weight, bias)
            if positions >= WINOGRAD_POSITIONS and self._suits_winograd(weight):
                return winograd.convolve(input, weight, bias, cast("tuple[int, int]", self.padding))
        return self._conv_forward(input, weight, bias)

    def _convolve(self, input: Tensor) -> Tensor:
        return self.convolve(input, self.weight, self.bias)

    def _gradient(self, gradient: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
        """The gradient of an input of some size, from that of the output."""
        padding = cast("tuple[int, int]", self.padding)
        if gradient.is_cpu and gradient.ndim == 4 and gradient.dtype == weight.dtype and self._is_plain(weight.dtype):
            positions = gradient.shape[0] * gradient.shape[2] * gradient.shape[3]
            if positions <= MOST_POSITIONS and weight.numel() >= FEWEST_WEIGHTS:
                windows = product(gradient.flatten(2).transpose(1, 2), weight.flatten(1).t(), None).transpose(1, 2)
                return functional.fold(windows, size[2:], self.kernel_size, self.dilation, padding, self.stride)
            if positions >= WINOGRAD_POSITIONS and self._suits_winograd(weight) and max(padding) <= 2:
                turned = weight.flip(2, 3).transpose(0, 1)  # what each input was seen with, from its outputs' side
                return winograd.convolve(gradient, turned, None, (2 - padding[0], 2 - padding[1]))
        of_layers: Any = layer_gradients  # torch types its pairs as single numbers
        return of_layers.conv2d_input(size, weight, gradient, self.stride, padding, self.dilation, self.groups)

    def _has_plain_padding(self) -> bool:
        return self.padding_mode == "zeros" and isinstance(self.padding, tuple)

    def _is_plain(self, dtype: torch.dtype) -> bool:
        return (
            self.kernel_size != (1, 1)
            and dtype == torch.float32
            and self.groups == 1
            and self._has_plain_padding()
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
        )

    def _suits_winograd(self, weight: Tensor) -> bool:
        return (
            self.kernel_size == (3, 3)
            and self.stride == self.dilation == (1, 1)
            and min(weight.shape[:2]) >= WINOGRAD_CHANNELS
            and not torch.is_grad_enabled()  # its steps would all be kept for the way back, which torch has in one step
        )

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution as one product of all its windows, (B * H' * W', in_channels * kernel), with the weights."""
        padding = cast("tuple[int, int]", self.padding)
        height, width = (
            (input.shape[2 + axis] + 2 * padding[axis] - self.dilation[axis] * (self.kernel_size[axis] - 1) - 1)
            // self.stride[axis]
            + 1
            for axis in (0, 1)
        )
        windows = functional.unfold(input, self.kernel_size, self.dilation, padding, self.stride).transpose(1, 2)
        output = product(windows, weight.flatten(1), bias)
        return output.transpose(1, 2).contiguous().reshape(input.shape[0], len(weight), height, width)


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
