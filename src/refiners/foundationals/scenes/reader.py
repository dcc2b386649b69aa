"""Reads pictures of scenes: which thing is in each of the four places, and the background.

Pictures (B, 3, 32, 32) in [-1, 1] to scores (B, `READER_CLASSES`, 2, 2): for each place those of its shape (or
nothing), its colour, its filling and the background, one after the other.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.fluxion.checks import list_of_pictures
from refiners.fluxion.context import placed
from refiners.fluxion.utils import images_to_tensor
from refiners.foundationals.scenes.drawing import IMAGE_SIZE
from refiners.foundationals.scenes.scene import BACKGROUNDS, COLORS, FILLS, NOTHING, SHAPES, Scene, Scenes

READER_WEIGHTS = Path(__file__).parent / "reader.safetensors"
CLASSES = (len(SHAPES) + 1, len(COLORS), len(FILLS), len(BACKGROUNDS))
READER_CLASSES = sum(CLASSES)


@dataclass(frozen=True)
class ReaderSpec:
    """The sizes of a reader: widths of its four levels, each half as high and wide as the one before."""

    channels: tuple[int, int, int, int] = (24, 48, 64, 96)
    norm_groups: int = 8


class ReaderLevel(fl.Chain):
    """A convolution that halves height and width, and one that does not."""

    def __init__(self, in_channels: int, out_channels: int, spec: ReaderSpec) -> None:
        super().__init__(
            fl.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1),
            fl.GroupNorm(out_channels, spec.norm_groups),
            fl.SiLU(),
            fl.Conv2d(out_channels, out_channels, kernel_size=3, padding=1),
            fl.GroupNorm(out_channels, spec.norm_groups),
            fl.SiLU(),
        )


class Reader(fl.Chain):
    """Scores of everything that a scene may have; `read` gives the scenes."""

    def __init__(
        self,
        spec: ReaderSpec | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.spec = spec or ReaderSpec()
        widths = [3, *self.spec.channels]
        with placed(device, dtype):
            super().__init__(
                *(ReaderLevel(before, after, self.spec) for before, after in pairwise(widths)),
                fl.Conv2d(widths[-1], READER_CLASSES, kernel_size=1),
            )

    def read(self, images: Float[Tensor, "b 3 32 32"]) -> Scenes:
        """The scenes that pictures in [-1, 1] show, as far as the reader can tell."""
        with torch.no_grad():
            shapes, colors, fills, backgrounds = split_scores(self(images))
        found = shapes.argmax(1)
        is_there = found != NOTHING
        return Scenes(found, colors.argmax(1) * is_there, fills.argmax(1) * is_there, backgrounds.mean(2).argmax(1))


def split_scores(scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores (B, READER_CLASSES, 2, 2) as those of shape, colour, filling and background, (B, classes, 4) each."""
    shapes, colors, fills, backgrounds = torch.split(scores.flatten(2), [*CLASSES], dim=1)
    return shapes, colors, fills, backgrounds


@functools.cache
def load_reader() -> Reader:
    """The reader that comes with the package, on the CPU."""
    return Reader(dtype=torch.float32).load_from_safetensors(READER_WEIGHTS).requires_grad_(False)


def load_image_encoder() -> fl.Chain:
    """What the reader makes of pictures before it names what it sees: PIL pictures, or as `read_scenes`, to (B, 96).

    It is for image prompts of the embedded model what CLIP's is for those of Stable Diffusion. Pictures of other sizes
    are resized.
    """
    return fl.Chain(fl.Lambda(as_small_tensor), load_reader()[:-1], fl.AvgPool2d(2), fl.Flatten(1))


def read_scenes(images: Sequence[Image.Image] | Float[Tensor, "b 3 32 32"]) -> list[Scene]:
    """What each picture shows; tensors are in [-1, 1].

    Raises ValueError if the pictures do not have 32 x 32 pixels, TypeError for what is no picture.
    """
    return load_reader().read(as_tensor(images)).to_list()


def as_small_tensor(images: Image.Image | Sequence[Image.Image] | Tensor) -> Tensor:
    """As `as_tensor`, but pictures may have any size."""
    if not isinstance(images, Tensor):
        images = [image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS) for image in _in_colours(images)]
    return as_tensor(images)


def as_tensor(images: Image.Image | Sequence[Image.Image] | Tensor) -> Tensor:
    """One picture or several as a tensor (B, 3, 32, 32) in [-1, 1], float32 on the CPU. Raises as `read_scenes`."""
    if not isinstance(images, Tensor):
        images = images_to_tensor(_in_colours(images)) * 2 - 1
    if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"the reader takes pictures of shape (3, {IMAGE_SIZE}, {IMAGE_SIZE}), not {tuple(images.shape[1:])}; "
            "resize them"
        )
    return images.float().cpu()


def _in_colours(images: Image.Image | Sequence[Image.Image]) -> list[Image.Image]:
    """A picture, or several, in colours. Raises TypeError for what is no picture."""
    return [image.convert("RGB") for image in list_of_pictures(images)]
