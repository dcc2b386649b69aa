"""Masks that say where in the picture an image prompt counts."""

from collections.abc import Sequence
from math import isfinite

import torch
from PIL import Image
from torch import Tensor

from refiners.fluxion.utils import images_to_tensor


def masks_to_tensor(masks: Sequence[Image.Image], scales: Sequence[float] | None = None) -> Tensor:
    """Masks as (1, P, H, W): 1, or the scale of the prompt, where a mask is white, half or more, else 0.

    masks: of one size and any mode; turned into grey, which forgets transparency.
    Raises ValueError if there are none, sizes differ, or scales are not as many and finite.
    """
    tensor = (images_to_tensor([mask.convert("L") for mask in masks]) >= 0.5).float().transpose(0, 1)
    if scales is None:
        return tensor
    if len(scales) != len(masks):
        raise ValueError(f"{len(scales)} scales for {len(masks)} masks: give one for each")
    if not all(map(isfinite, scales)):
        raise ValueError(f"the scales of masks are {list(scales)}, but should be finite numbers")
    return tensor * torch.tensor(scales, dtype=torch.float32).view(1, -1, 1, 1)
