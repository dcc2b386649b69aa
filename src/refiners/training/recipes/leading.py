"""What leads a model besides the text, as recipes train it: by pictures of the data set, and for pictures to make."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from pydantic import model_validator
from torch import Tensor

from refiners.training.data.latents import Conditioning
from refiners.training.recipes.config import TextToImageConfig

Show = Callable[[Sequence[Image.Image]], None]


@dataclass(frozen=True)
class Lead:
    """An adapter that takes in a picture with each sample.

    conditioning: what is prepared of such a picture before training.
    set: gives the adapter what was prepared for a batch, (B, …), before the UNet runs.
    show: gives it pictures, one for each that is to be made.
    drop_probability: how often, in training, all that was prepared is zeros.
    """

    conditioning: Conditioning
    set: Callable[[Tensor], None]
    show: Show
    drop_probability: float = 0.0


class LeadConfig(TextToImageConfig):
    """The settings of a recipe whose adapter trains in float32 inside of a UNet that may be in another format."""

    IS_LED = True

    @model_validator(mode="after")
    def _formats_meet(self) -> "LeadConfig":
        base, precision = self.models.dtype, self.training.precision
        if base != "float32" and precision != base:
            raise ValueError(
                f'models.dtype = "{base}" does not meet the float32 of what trains with training.precision = '
                f'"{precision}"; set that to "{base}" too'
            )
        return self


def to_bytes(image: Image.Image) -> Tensor:
    """A picture as (3, H, W), 0 … 255: a quarter of the memory that numbers in [0, 1] take."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def from_bytes(pixels: Tensor) -> Tensor:
    """What `to_bytes` made in [0, 1]."""
    return pixels.float() / 255


PIXELS = Conditioning(to_bytes, mark="pixels")  # for adapters that train what looks at the picture
