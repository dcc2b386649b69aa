"""FreeU (arXiv 2309.11497): on the way up, more of the backbone's features and less of the skips' low frequencies."""

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.adapters.delta import Scale
from refiners.adapters.scaling import Scaling
from refiners.fluxion.context import placed
from refiners.foundationals.latent_diffusion.steering.steering import Followed, Steering
from refiners.foundationals.latent_diffusion.unet import HasUNet, UNet, UpBlocks, unet_of


class FreeUAdapter(Steering):
    """Scales what the first levels on the way up take in, from the lowest resolution on.

    target: a UNet, or a model with one.
    backbone_scales: for each of these levels, of the first half of the channels that come from below.
    skip_scales: for each of these levels, of the lowest frequencies of what comes from the way down.
    Each scale is a number, or one for each picture of a batch.

    Raises ValueError if there are not as many of one as of the other, or more than the UNet has levels.
    """

    def __init__(
        self,
        target: UNet | HasUNet,
        backbone_scales: Sequence[Scale] = (1.2, 1.4),
        skip_scales: Sequence[Scale] = (0.9, 0.2),
    ) -> None:
        unet = unet_of(target)
        count, levels = len(skip_scales), len(unet.spec.channels)
        if len(backbone_scales) != count or count > levels:
            raise ValueError(
                f"FreeU takes as many backbone_scales as skip_scales, at most {levels} for this UNet, but got "
                f"{len(backbone_scales)} and {count}"
            )
        up, steps = unet.ensure_find(UpBlocks), range(unet.spec.blocks_per_level + 1)
        joints = [up[f"Chain_{index + 1}"].ensure_find(fl.Concatenate) for index in range(count * len(steps))]
        with placed(unet.device):
            self._backbones = [[ScaledHalf(scale) for _ in steps] for scale in backbone_scales]
            self._skips = [[ScaledLows(scale) for _ in steps] for scale in skip_scales]
        super().__init__(
            (Followed(joint.ensure_find(source), layer), joint)
            for source, layers_of_levels in ((fl.Identity, self._backbones), (fl.UseContext, self._skips))
            for joint, layer in zip(joints, chain.from_iterable(layers_of_levels), strict=True)
        )

    @property
    def backbone_scales(self) -> tuple[Scale, ...]:
        """One for each level. What was compiled stays good. Raises ValueError if another number of them is set."""
        return _get(self._backbones)

    @backbone_scales.setter
    def backbone_scales(self, values: Sequence[Scale]) -> None:
        _set(self._backbones, values)

    @property
    def skip_scales(self) -> tuple[Scale, ...]:
        """As `backbone_scales`."""
        return _get(self._skips)

    @skip_scales.setter
    def skip_scales(self, values: Sequence[Scale]) -> None:
        _set(self._skips, values)


class ScaledHalf(Scaling):
    """Scales the first half of the channels: (B, C, h, w) to the same."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return torch.cat([super().forward(x[:, :half]), x[:, half:]], dim=1)


class ScaledLows(Scaling):
    """Scales what a Fourier transform has at frequencies 0 and -1 along both sides: (B, C, h, w) to the same.

    These are the frequencies that the authors' code takes for the low ones, and it keeps the real part.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        low = lows(wide)
        return (wide - low + super().forward(low)).to(x.dtype)


def lows(x: Tensor) -> Tensor:
    """The real part of the terms of frequencies 0 and -1 along height and width: (…, h, w), real, to the same.

    Along one side these two terms make the matrix 1 + exp(-2πi (m - n) / h) over h, whose entries are sums of products
    of three waves: 1, cos and sin. So the picture is brought down to 3 x 3 numbers, and the waves back up.
    """
    rows, columns = _waves(x.shape[-2], x), _waves(x.shape[-1], x)
    found = rows @ x @ columns.mT
    imaginary = _quarter_turned(_quarter_turned(found).mT).mT
    return rows.mT @ (found - imaginary) @ columns / x.shape[-2:].numel()


def _waves(size: int, like: Tensor) -> Tensor:
    """1, cos and sin of one period: (3, size); of a single position it is 1 alone, as all frequencies are one there."""
    angles = 2 * math.pi / size * torch.arange(size, device=like.device, dtype=like.dtype)
    waves = torch.stack([torch.ones_like(angles), angles.cos(), angles.sin()])
    return waves if size > 1 else waves * waves.new_tensor([[1.0], [0.0], [0.0]])


def _quarter_turned(found: Tensor) -> Tensor:
    """What cos and sin become by -i: (…, 3, k) to the same."""
    _, cosine, sine = found.unbind(dim=-2)
    return torch.stack([torch.zeros_like(sine), -sine, cosine], dim=-2)


def _get(levels: Sequence[Sequence[Scaling]]) -> tuple[Scale, ...]:
    return tuple(layers[0].scale for layers in levels)


def _set(levels: Sequence[Sequence[Scaling]], values: Sequence[Scale]) -> None:
    if len(values) != len(levels):
        raise ValueError(f"{len(values)} scales, but this FreeU is on {len(levels)} levels: give one for each")
    for layers, value in zip(levels, values, strict=True):
        for layer in layers:
            layer.scale = value
