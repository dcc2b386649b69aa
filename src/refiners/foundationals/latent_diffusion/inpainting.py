"""Models that were trained to fill in: their UNet also sees the mask and what is outside of it (9 channels)."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Self

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from refiners.fluxion.checks import picture
from refiners.fluxion.utils import image_to_tensor
from refiners.foundationals.latent_diffusion.model import LatentDiffusionModel, mask_to_tensor, resized


class Inpainting(LatentDiffusionModel):
    """Mixin for latent diffusion models that fill in: what is to be filled in is set before the steps."""

    _conditions: Tensor | None = None

    def set_inpainting_conditions(
        self,
        target_image: Image.Image,
        mask: Image.Image,
        latents_size: tuple[int, int] | None = None,
        tile_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Say what to fill in: where `mask` is white, half or more; it stays until other conditions are set.

        latents_size: height and width of the latents; None takes them from the picture, which else is resized.
        tile_size: as for `init_latents`.
        Returns the mask (1, 1, h, w), 1 where to fill in, and the latents of the rest (1, 4, h, w).
        """
        factor = self.lda.spec.downsampling_factor
        own_width, own_height = picture(target_image).size
        height, width = latents_size or self.latents_size((own_height, own_width))
        size = (height * factor, width * factor)
        pixels = image_to_tensor(resized(target_image, size), device=self.device, dtype=self.lda.dtype) * 2 - 1
        is_new = mask_to_tensor(mask, target_image, size).to(pixels)
        mask_latents = functional.interpolate(is_new, size=(height, width)).to(self.dtype)
        target_latents = self.lda.encode(pixels * (1 - is_new), tile_size=tile_size).to(self.dtype)
        self._conditions = torch.cat([mask_latents, target_latents], dim=1)
        return mask_latents, target_latents

    @contextmanager
    def unchanged(self) -> Generator[None]:
        """Inside `with`, the solver and the inpainting conditions may be others; afterwards they are as before."""
        conditions = self._conditions
        try:
            with super().unchanged():
                yield
        finally:
            self._conditions = conditions

    def prepare_mask(
        self,
        init_image: Image.Image,
        mask: Image.Image,
        size: tuple[int, int],
        noise: Tensor,
        tile_size: int | None = None,
    ) -> Callable[[Tensor, int], Tensor]:
        """Set the inpainting conditions; nothing is to be done with x after a step."""
        self.set_inpainting_conditions(init_image, mask, self.latents_size(size), tile_size)
        return lambda x, step: x

    def structural_copy(self) -> Self:
        """As of any model, with the same inpainting conditions."""
        clone = super().structural_copy()
        clone._conditions = self._conditions
        return clone

    def _model_input(self, x: Tensor) -> Tensor:
        if self._conditions is None:
            raise ValueError("an inpainting model must be told what to fill in: call set_inpainting_conditions first")
        if self._conditions.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"the inpainting conditions are for latents of {tuple(self._conditions.shape[2:])}, but these are "
                f"{tuple(x.shape[2:])}: set them for this size"
            )
        return torch.cat([x, self._conditions.expand(x.shape[0], -1, -1, -1)], dim=1)
