"""Layers that change the height and width of pictures, or the length of sequences."""

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F

from refiners.fluxion.context import Contexts, placed
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.combinators import Parallel
from refiners.fluxion.layers.contexts import SetContext, UseContext
from refiners.fluxion.layers.conv import Conv2d
from refiners.fluxion.layers.functional import Identity, Lambda
from refiners.fluxion.layers.module import Module, single_output


@single_output
class Interpolate(Module):
    """Resample (B, C, H, W) to the height and width of the second input, or by `factor`.

    mode: as in torch.nn.functional.interpolate ("nearest", "bilinear", "bicubic", "area", …).
    """

    def __init__(self, mode: str = "nearest", factor: float | None = None, antialias: bool = False) -> None:
        super().__init__()
        self.mode = mode
        self.factor = factor
        self.antialias = antialias

    def forward(self, x: Tensor, shape: Size | None = None) -> Tensor:
        if (shape is None) == (self.factor is None):
            raise ValueError("Interpolate takes either the (H, W) to reach as a second input, or a factor when built")
        size = None if shape is None else tuple(shape)
        return F.interpolate(x, size=size, scale_factor=self.factor, mode=self.mode, antialias=self.antialias)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, factor={self.factor}"


class Downsample(Chain):
    """A strided 3x3 convolution: (B, channels, H, W) to (B, channels, H / scale_factor, W / scale_factor).

    padding: that of the convolution. With 0 the picture is first padded by one at the right and bottom, as in the
        encoder of latent diffusion's autoencoder.
    register_shape: push the incoming (H, W) onto the list at key "shapes" of context "sampling", where `Upsample`
        takes it from.
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int,
        padding: int = 0,
        register_shape: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.channels = channels
        self.scale_factor = scale_factor
        with placed(device, dtype):
            super().__init__(
                *([SetContext("sampling", "shapes", callback=_push_shape)] if register_shape else []),
                *([Lambda(_pad_right_and_bottom)] if padding == 0 else []),
                Conv2d(channels, channels, kernel_size=3, stride=scale_factor, padding=padding),
            )

    def init_context(self) -> Contexts:
        return {"sampling": {"shapes": []}}


class Upsample(Chain):
    """Nearest-neighbour enlargement, then a 3x3 convolution: (B, channels, H, W) to (B, channels, H', W').

    upsample_factor: how much larger. None: to the (H, W) that the matching `Downsample` saw, popped from context
        "sampling", key "shapes".
    """

    def __init__(
        self,
        channels: int,
        upsample_factor: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.channels = channels
        self.upsample_factor = upsample_factor
        shape = UseContext("sampling", "shapes").compose(_pop_shape) if upsample_factor is None else None
        with placed(device, dtype):
            super().__init__(
                *([Parallel(Identity(), shape), Interpolate()] if shape else [Interpolate(factor=upsample_factor)]),
                Conv2d(channels, channels, kernel_size=3, padding=1),
            )


@single_output
class PixelUnshuffle(nn.PixelUnshuffle, Module):
    """(B, C, H f, W f) to (B, C f^2, H, W), for f = downscale_factor (arXiv 1609.05158, inverted)."""

    def __init__(self, downscale_factor: int) -> None:
        super().__init__(downscale_factor)


@single_output
class ReflectionPad2d(nn.ReflectionPad2d, Module):
    """Pad all sides of (B, C, H, W) by `padding` (or left, right, top, bottom) with the mirrored picture."""

    def __init__(self, padding: int | tuple[int, int, int, int]) -> None:
        super().__init__(padding)


@single_output
class AvgPool2d(nn.AvgPool2d, Module):
    """The mean of each window over the last two dimensions of (B, C, H, W)."""

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode)


class MaxPool1d(nn.MaxPool1d, Module):
    """The largest of each window along the last dimension of (B, C, L)."""

    def __init__(
        self,
        kernel_size: int,
        stride: int | None = None,
        padding: int = 0,
        dilation: int = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)


class MaxPool2d(nn.MaxPool2d, Module):
    """The largest of each window over the last two dimensions of (B, C, H, W)."""

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)


def _push_shape(shapes: list[Size], x: Tensor) -> None:
    shapes.append(x.shape[2:])


def _pop_shape(shapes: list[Size]) -> Size:
    if not shapes:
        raise IndexError('context "sampling" holds no more shapes: each Upsample needs a Downsample before it')
    return shapes.pop()


def _pad_right_and_bottom(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1, 0, 1))
