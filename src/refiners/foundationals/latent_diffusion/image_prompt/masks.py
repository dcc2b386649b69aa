"""Masks that say where in the picture an image prompt counts."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from refiners.fluxion.checks import list_of_numbers, list_of_pictures
from refiners.fluxion.utils import images_to_tensor


def masks_to_tensor(masks: Image.Image | Sequence[Image.Image], scales: Sequence[float] | None = None) -> Tensor:
    """Masks as (1, P, H, W): 1, or the scale of the prompt, where a mask is white, half or more, else 0.

    masks: one or several, of one size and any mode; turned into grey, which forgets transparency.
    Raises ValueError if there are none, sizes differ, or scales are not as many and finite, TypeError for others.
    """
    images = list_of_pictures(masks, "the mask")
    tensor = (images_to_tensor([image.convert("L") for image in images]) >= 0.5).float().transpose(0, 1)
    if scales is None:
        return tensor
    factors = list_of_numbers(scales, "the scales of masks", len(images))
    return tensor * torch.tensor(factors, dtype=torch.float32).view(1, -1, 1, 1)
