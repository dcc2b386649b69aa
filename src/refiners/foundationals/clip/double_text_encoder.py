"""Two text encoders side by side, as Stable Diffusion XL reads them (arXiv 2307.01952, section 2.1)."""

from typing import Any

import torch
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.fluxion.context import placed
from refiners.foundationals.clip.text_encoder import SDXL_CLIP_G, SDXL_CLIP_L, CLIPTextEncoder

# Where the two sit in the tree.
ENCODER_PATHS = ("Distribute.CLIPTextEncoder_1", "Distribute.CLIPTextEncoder_2")


class DoubleTextEncoder(fl.Chain):
    """Text, several texts, or token ids (B, L), to (B, L, 768 + 1280) and the second's vectors of texts, (B, 1280).

    Two inputs are for one encoder each: token ids, where the two fill up short texts differently.

    first, second: None for those of Stable Diffusion XL. The second must have a projection.
    """

    def __init__(
        self,
        first: CLIPTextEncoder | None = None,
        second: CLIPTextEncoder | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        with placed(device, dtype):
            super().__init__(
                ForBoth(),
                fl.Distribute(
                    first or CLIPTextEncoder(SDXL_CLIP_L),
                    second or CLIPTextEncoder(SDXL_CLIP_G),
                ),
                fl.Lambda(_side_by_side),
            )


class ForBoth(fl.Module):
    """Two inputs as they are, one input twice."""

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        return inputs if len(inputs) == 2 else inputs * 2


def _side_by_side(first: Tensor, second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    embedding, pooled = second
    return torch.cat([first, embedding], dim=-1), pooled
