"""Prompts for regions of a picture: where a position is in a region, it attends to the text of that region.

Each cross-attention is computed for every text, and its results are mixed by the masks, at the attention's resolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

import refiners.fluxion.layers as fl
from refiners.adapters.adapter import Adapter
from refiners.fluxion.checks import in_eight_bits, list_of_numbers
from refiners.fluxion.context import Contexts
from refiners.fluxion.utils import image_to_tensor
from refiners.foundationals.latent_diffusion.image_prompt.cross_attentions import find_cross_attentions
from refiners.foundationals.latent_diffusion.model import LatentDiffusionModel
from refiners.foundationals.latent_diffusion.participant import Participant
from refiners.foundationals.latent_diffusion.unet import UNet

CONTEXT = "regional_prompts"


@dataclass(frozen=True)
class Region:
    """A part of the picture, and what is in it.

    mask: white where the region is, grey for partly; of any mode, which is turned into grey. Or the left, top, right
        and bottom of a rectangle, in shares of the picture's width and height.
    """

    prompt: str
    mask: Image.Image | tuple[float, float, float, float]
    negative_prompt: str = ""

    def weights(self, height: int, width: int) -> Tensor:
        """How far each position is in the region, 0 … 1: (1, height, width).

        Raises ValueError for no rectangle, TypeError for what is neither that nor a picture.
        """
        if isinstance(self.mask, Image.Image):
            grey = image_to_tensor(in_eight_bits(self.mask).convert("L"))[0]
            return functional.adaptive_avg_pool2d(grey, (height, width))
        left, top, right, bottom = list_of_numbers(self.mask, "the mask of a region, which is no picture,", 4)
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(
                f"{self.mask} is no rectangle in a picture: left, top, right, bottom should be shares from 0 to 1, and "
                "left less than right, top less than bottom"
            )
        return (_share_inside(top, bottom, height)[:, None] * _share_inside(left, right, width))[None]


class RegionalPrompts(fl.Chain, Participant):
    """Lets regions of the picture have prompts of their own; that of the picture counts elsewhere.

        regions = RegionalPrompts(sd15, [Region("a cat", left_half), Region("a dog", (0.5, 0, 1, 1))]).inject()
        sd15.generate("two animals on a sofa")

    size: height and width of the picture that is made, in pixels; None for those that the model was trained on.
    Where regions overlap they share a position. What a text says as a whole (the pooled embedding of Stable Diffusion
    XL) is that of the picture's prompt, and so is what a ControlNet reads.
    Raises ValueError if there are no regions.
    """

    is_adapter = True  # its tensors are none of the base's

    def __init__(
        self, model: LatentDiffusionModel, regions: Sequence[Region], size: tuple[int, int] | None = None
    ) -> None:
        if not regions:
            raise ValueError("there are no regions: give at least one")
        size = size or (model.spec.default_size, model.spec.default_size)
        super().__init__()
        self._target = [model.unet]  # in a list: no child
        self.count = len(regions)
        weights = torch.cat([region.weights(*model.latents_size(size)) for region in regions])
        weights = torch.cat([(1 - weights.sum(dim=0, keepdim=True)).clamp(min=0), weights])
        weights = (weights / weights.sum(dim=0)).to(model.device, model.dtype)
        self.register_buffer("weights", weights[None], persistent=False)  # (1, 1 + regions, h, w)
        for index, region in enumerate(regions):
            with torch.no_grad():
                conditions = model.compute_conditions(region.prompt, region.negative_prompt, size)
            self.register_buffer(_text(index), conditions["clip_text_embedding"], persistent=False)

    def inject(self) -> Self:
        """Let the UNet attend by regions. Raises RuntimeError if it does already."""
        unet = self._target[0]
        if unet.find(RegionalPrompts) is not None:
            raise RuntimeError("this UNet has RegionalPrompts already: eject those first")
        with fl.transaction():
            unet.insert(0, self)
            for attention in find_cross_attentions(unet):
                RegionalAttention(attention.layer).inject()
        return self

    def eject(self) -> None:
        """Take it off the UNet, which is as it was before. Raises RuntimeError if it is not on one."""
        if self.parent is None:
            raise RuntimeError("these RegionalPrompts are not injected, so they cannot be ejected")
        unet = cast(UNet, self.parent)
        with fl.transaction():
            for attention in list(unet.layers(RegionalAttention)):
                attention.eject()
            unet.remove(self)
        self._target = [unet]

    @property
    def conditions(self) -> dict[str, Tensor]:
        """The texts of the regions as conditions of the UNet, in halves: (2, L, D)."""
        texts = [_text(index) for index in range(self.count)]
        return {f"{CONTEXT}.{text}": cast(Tensor, self._buffers[text]) for text in texts}

    @property
    def spatial_conditions(self) -> dict[str, Tensor]:
        """How far each position is in each region, the first of which is what no region covers."""
        return {f"{CONTEXT}.weights": self.weights}

    def init_context(self) -> Contexts:
        return {CONTEXT: dict(self._buffers)}


class RegionalAttention(fl.Chain, Adapter[fl.Attention]):
    """Attention over the texts of all regions, mixed by where a position lies."""

    def __init__(self, target: fl.Attention) -> None:
        with self.setup_adapter(target):
            super().__init__(target)

    def forward(self, *inputs: Any) -> Tensor:
        query, *text_of_picture = inputs
        context = self.use_context(CONTEXT)
        size = self.use_context("flatten")["sizes"][-1]
        weights = functional.adaptive_avg_pool2d(context["weights"], size).flatten(2)[..., None]
        (attention,) = self._plan
        mixed = weights[:, 0] * attention(query, *text_of_picture)
        for index in range(weights.shape[1] - 1):
            text = context[_text(index)]
            mixed = mixed + weights[:, index + 1] * attention(query, text, text)
        return mixed


def _text(index: int) -> str:
    return f"text_{index}"


def _share_inside(start: float, end: float, count: int) -> Tensor:
    """Of `count` equal parts of 0 … 1, how much of each is between start and end."""
    edges = torch.linspace(0, 1, count + 1, dtype=torch.float64).clamp(start, end)
    return (edges.diff() * count).float()
