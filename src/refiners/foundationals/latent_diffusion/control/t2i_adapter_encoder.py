"""The condition encoder of T2I-Adapter (arXiv 2302.08453, section 3.3): a picture to features for levels of a UNet.

(B, in_channels, H, W) in [0, 1] to one (B, C, h, w) for each level, the finest first.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from operator import mul

import torch

import refiners.fluxion.layers as fl
from refiners.fluxion.context import placed
from refiners.foundationals.latent_diffusion.unet import UNetSpec


@dataclass(frozen=True)
class T2ISpec:
    """The sizes of a condition encoder.

    channels: width of the features of each level.  halvings: how much smaller than the one before each level is.
    unshuffle_factor: side in pixels of the squares that become the first features.
    in_channels: 3 for colour pictures, 1 for grey ones.
    narrowing: how many times narrower the residual blocks are than the features. 1 for the full adapter; 4 for the
        light one, which has no first convolution, and two 3x3 convolutions in a block rather than a 3x3 and a 1x1.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    halvings: tuple[int, ...] = (1, 2, 2, 2)
    blocks_per_level: int = 2
    unshuffle_factor: int = 8
    in_channels: int = 3
    narrowing: int = 1

    def __post_init__(self) -> None:
        if len(self.channels) != len(self.halvings):
            raise ValueError(
                f"channels {self.channels} and halvings {self.halvings} must have one entry per level each"
            )

    @property
    def is_light(self) -> bool:
        """Whether it is the light adapter."""
        return self.narrowing > 1

    @property
    def patch_sides(self) -> tuple[int, ...]:
        """How many pixels of a picture's side make one of the features of each level."""
        return tuple(accumulate((self.unshuffle_factor * self.halvings[0], *self.halvings[1:]), mul))

    @classmethod
    def for_unet(cls, spec: UNetSpec, downsampling_factor: int = 8, in_channels: int = 3) -> "T2ISpec":
        """A full adapter for a UNet over latents of which each is that many pixels wide.

        >>> T2ISpec.for_unet(UNetSpec()) == T2ISpec()
        True
        """
        places = feature_places(spec)
        sides = [place.scale for place in places]
        return cls(
            channels=tuple(place.width for place in places),
            halvings=(1, *(after // before for before, after in pairwise(sides))),
            unshuffle_factor=downsampling_factor * sides[0],
            in_channels=in_channels,
        )


@dataclass(frozen=True)
class FeaturePlace:
    """Where in a UNet the features of one level are added: to what a step gives, before it is left for the way up.

    slots: of the step, from the UNet down.  scale: how many latents make one of the positions there.
    """

    slots: tuple[str, ...]
    width: int
    scale: int


def feature_places(spec: UNetSpec) -> list[FeaturePlace]:
    """One place for each level, and one after the middle block where the first level has no transformer.

    Levels with transformers have it after their last residual block; those without after their halving, if they have
    one. For Stable Diffusion 1 that is where the authors have it, for XL it is where diffusers has it.
    """
    last, steps = len(spec.channels) - 1, spec.blocks_per_level + 1
    places: list[FeaturePlace] = []
    for level, width in enumerate(spec.channels):
        is_after_halving = level < last and not spec.transformer_layers[level]
        slot = f"Chain_{(level + 1) * steps + is_after_halving}"
        places.append(FeaturePlace(("DownBlocks", slot), width, 2 ** (level + is_after_halving)))
    middle = FeaturePlace(("MiddleBlock",), spec.channels[-1], 2**last)
    return places if spec.transformer_layers[0] else [*places, middle]


SD1_T2I = T2ISpec()
SD1_T2I_LIGHT = replace(SD1_T2I, blocks_per_level=4, narrowing=4)
SDXL_T2I = T2ISpec(halvings=(1, 1, 2, 1), unshuffle_factor=16)


class ConditionEncoder(fl.Chain):
    """A picture to the features of each level, as a tuple."""

    def __init__(
        self,
        spec: T2ISpec = SD1_T2I,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.spec = spec
        pixels = spec.in_channels * spec.unshuffle_factor**2
        first = pixels if spec.is_light else spec.channels[0]
        widths = (first, *spec.channels)
        with placed(device, dtype):
            super().__init__(
                fl.PixelUnshuffle(spec.unshuffle_factor),
                *([] if spec.is_light else [fl.Conv2d(pixels, first, kernel_size=3, padding=1)]),
                fl.Cascade(FeatureLevel(widths[level], level, spec) for level in range(len(spec.channels))),
            )


class FeatureLevel(fl.Chain):
    """The features of one level from those of the one before."""

    def __init__(self, in_channels: int, level: int, spec: T2ISpec) -> None:
        out_channels, halving = spec.channels[level], spec.halvings[level]
        width = out_channels // spec.narrowing
        super().__init__(
            *([fl.AvgPool2d(halving, ceil_mode=True)] if halving > 1 else []),
            *([fl.Conv2d(in_channels, width, kernel_size=1)] if spec.is_light or in_channels != width else []),
            *_residual_blocks(width, spec),
            *([fl.Conv2d(width, out_channels, kernel_size=1)] if spec.is_light else []),
        )


def _residual_blocks(width: int, spec: T2ISpec) -> Iterator[fl.Residual]:
    last_size = 3 if spec.is_light else 1
    for _ in range(spec.blocks_per_level):
        yield fl.Residual(
            fl.Conv2d(width, width, kernel_size=3, padding=1),
            fl.ReLU(),
            fl.Conv2d(width, width, kernel_size=last_size, padding=last_size // 2),
        )
