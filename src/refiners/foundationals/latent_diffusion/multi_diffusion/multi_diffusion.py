"""MultiDiffusion (arXiv 2302.08113): pictures of any size by a model of one, in overlapping windows.

At each step the UNet predicts for each window, and where windows overlap the mean counts. As steps of solvers are
linear in the prediction, that is the same as the mean of the windows' steps, which the paper has.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from refiners.fluxion.checks import instance_of, whole_number
from refiners.fluxion.context import Context
from refiners.foundationals.latent_diffusion.copies import Twins
from refiners.foundationals.latent_diffusion.model import LatentDiffusionModel
from refiners.foundationals.latent_diffusion.multi_diffusion.windows import Window, Windows
from refiners.foundationals.latent_diffusion.unet_call import UNetCall, check_one_for_each


class MultiDiffusion:
    """Lets a model make pictures larger than those it was trained on.

        panorama = MultiDiffusion(sd15, stride=64).inject()
        sd15.generate("a mountain range", size=(512, 2048))
        panorama.eject()

    What else leads the model and covers the picture, such as a ControlNet's picture, is that of the whole, and is cut
    out along with the windows.

    window_size: side in pixels; None for that of the pictures which the model was trained on. Pictures no larger than a
        window are made whole.
    stride: from one window to the next, in pixels; None for half a window.
    is_circular: the left and the right side of the picture meet.
    is_faded: windows count less towards their sides; in the paper they count alike.
    window_batch_size: how many windows the UNet is given at once.
    Raises ValueError for windows that are no whole number of latents, or strides that leave gaps, TypeError if it
    is given no model.
    """

    def __init__(
        self,
        model: LatentDiffusionModel,
        window_size: int | None = None,
        stride: int | None = None,
        is_circular: bool = False,
        is_faded: bool = False,
        window_batch_size: int = 1,
    ) -> None:
        instance_of(model, LatentDiffusionModel, "the model", "a whole one, not a part of it")
        factor = model.lda.spec.downsampling_factor
        window_size = model.spec.default_size if window_size is None else whole_number(window_size, "window_size")
        stride = max(window_size // 2 // factor, 1) * factor if stride is None else whole_number(stride, "stride")
        if window_size % factor or stride % factor or not 0 < stride <= window_size:
            raise ValueError(
                f"windows of {window_size} pixels, each {stride} after the one before, do not cover latents of "
                f"{factor} pixels: both must be multiples of that, and the stride no more than the window"
            )
        if window_batch_size < 1:
            raise ValueError(f"window_batch_size is {window_batch_size}, but should be at least 1")
        self.model = model
        self.window_size = window_size
        self.stride = stride
        self.is_circular = is_circular
        self.is_faded = is_faded
        self.window_batch_size = window_batch_size

    def inject(self) -> Self:
        """Let the model run in windows. Raises RuntimeError if it does already."""
        if self.model.unet_runner is not None:
            name = type(self.model.unet_runner).__name__
            raise RuntimeError(f"the model's UNet is run by a {name} already: eject that first")
        self.model.unet_runner = self
        return self

    def eject(self) -> None:
        """Let the model see pictures whole again. Raises RuntimeError if it is not injected."""
        if self.model.unet_runner is not self:
            raise RuntimeError("this MultiDiffusion is not injected, so it cannot be ejected")
        self.model.unet_runner = None

    def copied(self, twins: Twins) -> Self:
        """The same for a copy of the model."""
        clone = copy(self)
        clone.model = twins[self.model]
        return clone

    def windows(self, size: tuple[int, int]) -> Windows:
        """The windows on latents of that height and width."""
        factor = self.model.lda.spec.downsampling_factor
        return Windows(size, self.window_size // factor, self.stride // factor, self.is_circular)

    def run(self, call: UNetCall) -> Tensor:
        """The prediction of the model's UNet for a call, window by window."""
        height, width = call.x.shape[2:]
        windows, count = self.windows((height, width)), self.window_batch_size
        places = list(windows)
        participants = self.model.unet.participants
        spatial = {name: value for each in participants for name, value in each.spatial_conditions.items()}
        for name, condition in spatial.items():
            check_one_for_each(f"{name!r}", len(condition), len(call.x), call.contexts["diffusion"])
        parts: list[tuple[Window, Tensor]] = []
        for some in (places[start : start + count] for start in range(0, len(places), count)):
            predicted = self._part(call, windows, some, spatial).run(self.model.unet)
            parts += zip(some, _unstacked(predicted, len(some), _negatives(call)), strict=True)
        return windows.blend(parts, self.is_faded)

    def _part(
        self, call: UNetCall, windows: Windows, some: Sequence[Window], spatial: Mapping[str, Tensor]
    ) -> UNetCall:
        """A call for some of the windows."""
        batch, negatives = call.x.shape[0], _negatives(call)

        def crops(x: Tensor) -> Tensor:
            whole = x if len(some) == 1 else _for_batch(x, batch)
            return _stacked([windows.crop(whole, window) for window in some], negatives)

        contexts: dict[str, Context] = {name: dict(values) for name, values in call.contexts.items()}
        contexts["diffusion"] |= {"negatives": negatives * len(some), "windows": len(some)}
        for name, condition in spatial.items():
            context, key = name.split(".", 1)
            contexts.setdefault(context, {})[key] = crops(condition)
        conditions = {name: _stacked([value] * len(some), negatives) for name, value in call.conditions.items()}
        return replace(call, x=crops(call.x), conditions=conditions, contexts=contexts)


def _negatives(call: UNetCall) -> int:
    return call.contexts["diffusion"]["negatives"]


def _for_batch(x: Tensor, batch: int) -> Tensor:
    return x.repeat(batch // x.shape[0], 1, 1, 1)


def _stacked(parts: list[Tensor], negatives: int) -> Tensor:
    """Batches joined to one, in which the negative rows of all come first."""
    return torch.cat([part[:negatives] for part in parts] + [part[negatives:] for part in parts])


def _unstacked(x: Tensor, count: int, negatives: int) -> list[Tensor]:
    """The batches that were joined."""
    rows: Sequence[Tensor] = torch.split(x, [negatives] * count + [len(x) // count - negatives] * count)
    return [torch.cat(pair) for pair in zip(rows[:count], rows[count:], strict=True)]
