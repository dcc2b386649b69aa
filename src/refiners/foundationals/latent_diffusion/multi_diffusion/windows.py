"""Where windows lie in latents, what they cut out of tensors, and how what comes of the parts is blended."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from refiners.foundationals.latent_diffusion.tiles import fade


@dataclass(frozen=True)
class Window:
    """A rectangle of latents; one that goes over the right side goes on at the left."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Windows:
    """Overlapping rectangles that cover latents.

    size: height and width of the latents.
    side, stride: of the windows, and from one to the next; the last ones end where the latents do.
    is_circular: the left and the right side of the latents meet, and windows lie across.
    """

    size: tuple[int, int]
    side: int
    stride: int
    is_circular: bool = False

    def __iter__(self) -> Iterator[Window]:
        """Row by row."""
        height, width = self.size
        for top in _starts(height, self.side, self.stride):
            is_wrapped = self.is_circular and width > self.side
            for left in range(0, width, self.stride) if is_wrapped else _starts(width, self.side, self.stride):
                yield Window(top, left, min(self.side, height), min(self.side, width))

    def crop(self, x: Tensor, window: Window) -> Tensor:
        """The part of x (…, H, W), which covers the same as the latents in finer or coarser values."""
        rows = _scaled(window.top, window.height, self.size[0], x.shape[-2])
        columns = _scaled(window.left, window.width, self.size[1], x.shape[-1])
        part = x[..., rows, columns]
        beyond = columns.stop - x.shape[-1]
        whole = part if beyond <= 0 else torch.cat([part, x[..., rows, :beyond]], dim=-1)
        return whole.contiguous()  # one layout for all windows, so that a compiled UNet is compiled once

    def blend(self, parts: Sequence[tuple[Window, Tensor]], is_faded: bool) -> Tensor:
        """The mean of what the windows say of each position, (B, C, h, w) (arXiv 2302.08113, eq. 5).

        is_faded: windows count less towards their sides.
        """
        first = parts[0][1]
        height, width = self.size
        dtype = torch.promote_types(first.dtype, torch.float32)  # as there may be many windows to add up
        total = first.new_zeros(*first.shape[:2], height, width + self.side, dtype=dtype)
        weight_sum = first.new_zeros(height, width + self.side, dtype=dtype)
        overlap = 1 - self.stride / self.side if is_faded else 0
        for window, part in parts:
            weights = fade(window.height, overlap, total)[:, None] * fade(window.width, overlap, total)
            place = (..., slice(window.top, window.top + window.height), slice(window.left, window.left + window.width))
            total[place] += part * weights
            weight_sum[place] += weights
        for x in (total, weight_sum):
            x[..., : self.side] += x[..., width:]
        return (total[..., :width] / weight_sum[..., :width]).to(first.dtype)


def _starts(length: int, side: int, stride: int) -> list[int]:
    last = max(length - side, 0)
    return [*range(0, last, stride), last]


def _scaled(start: int, length: int, whole: int, scaled_whole: int) -> slice:
    """From start on, for a length, in something with `scaled_whole` values over what is `whole` long.

    Coarser values come of halvings that round up, as in UNets; where windows do not begin with one of them, the nearest
    does.
    """
    unit = next((2**count for count in range(1, 8) if ceil(whole / 2**count) == scaled_whole), None)
    if unit is None:
        first, count = round(start * scaled_whole / whole), max(round(length * scaled_whole / whole), 1)
    else:
        first, count = round(start / unit), ceil(length / unit)
    if start + length <= whole:
        first = min(first, scaled_whole - count)
    return slice(first, first + count)
