"""Stable Diffusion XL (arXiv 2307.01952): the base, its form that was trained to fill in, and the refiner."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from refiners.foundationals.clip.double_text_encoder import DoubleTextEncoder
from refiners.foundationals.clip.prompts import encode_pooled_prompt
from refiners.foundationals.clip.text_encoder import CLIPTextEncoder
from refiners.foundationals.latent_diffusion.inpainting import Inpainting
from refiners.foundationals.latent_diffusion.specs import SDXL, SDXL_INPAINTING, SDXL_REFINER, StableDiffusionSpec
from refiners.foundationals.latent_diffusion.stable_diffusion import StableDiffusion, pair_prompts

AESTHETIC_SCORES = (2.5, 6.0)  # of the negative prompt and the prompt, as diffusers has them by default


class StableDiffusion_XL(StableDiffusion[DoubleTextEncoder | CLIPTextEncoder]):
    """Text to image.

        embedding, pooled = sdxl.compute_text_embedding("a cute cat")
        time_ids = sdxl.compute_time_ids((1024, 1024))
        x = sdxl.init_latents((1024, 1024))
        for step in sdxl.steps:
            x = sdxl(
                x, step=step, clip_text_embedding=embedding, pooled_text_embedding=pooled, time_ids=time_ids,
                condition_scale=5.0,
            )
        image = sdxl.lda.decode_latents(x)

    `generate` does all of that in one call; `from_pretrained` makes one from files.
    """

    default_spec: ClassVar[StableDiffusionSpec | None] = SDXL

    def compute_text_embedding(
        self, text: str | Sequence[str], negative_text: str | Sequence[str] | None = ""
    ) -> tuple[Tensor, Tensor]:
        """Encode P prompts, and as many negative ones or one for all: (2 P, L, D) and (2 P, D'), negative ones first.

        negative_text: None for zeros in the place of what an empty prompt gives, as the base was trained with, and as
            diffusers does where no negative prompt is given.

        `(word:1.3)` counts more, and long prompts take as many chunks of 77 tokens as they need: see
        `refiners.foundationals.clip.encode_prompt`. Raises ValueError if there are no prompts, or the numbers differ.
        """
        if negative_text is None:
            embedding, pooled = encode_pooled_prompt(self.clip_text_encoder, text)
            return torch.cat([torch.zeros_like(embedding), embedding]), torch.cat([torch.zeros_like(pooled), pooled])
        return encode_pooled_prompt(self.clip_text_encoder, pair_prompts(text, negative_text))

    compute_clip_text_embedding = compute_text_embedding  # as in later versions of the first refiners

    def compute_time_ids(
        self,
        size: tuple[int, int],
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """What the UNet is told of a picture besides the text (arXiv 2307.01952, section 2.2): (2, 6).

        size: height and width in pixels.  original_size: those before a picture of the training data was resized; low
        ones give blurred pictures; None for `size`.  crop: what was cut off at the top and at the left of it.
        """
        return torch.tensor([[*(original_size or size), *crop, *size]] * 2, device=self.device, dtype=torch.float32)

    @property
    def default_time_ids(self) -> Tensor:
        """Those of a picture of the size that the model was trained on."""
        return self.compute_time_ids((self.spec.default_size, self.spec.default_size))

    def compute_conditions(
        self, text: str | Sequence[str], negative_text: str | Sequence[str] | None, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """The text embeddings, and the time ids of a whole picture of that size."""
        embedding, pooled = self.compute_text_embedding(text, negative_text)
        return {
            "clip_text_embedding": embedding,
            "pooled_text_embedding": pooled,
            "time_ids": self.compute_time_ids(size),
        }


class StableDiffusion_XL_Inpainting(Inpainting, StableDiffusion_XL):
    """Stable Diffusion XL trained to fill in."""

    default_spec: ClassVar[StableDiffusionSpec | None] = SDXL_INPAINTING


class StableDiffusion_XL_Refiner(StableDiffusion_XL):
    """The refiner: trained for the last fifth of the way, for which it takes over the latents of the base.

    It reads the second text encoder alone, and an aesthetic score in the place of the target size.
    """

    default_spec: ClassVar[StableDiffusionSpec | None] = SDXL_REFINER

    def compute_time_ids(
        self,
        size: tuple[int, int],
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
        aesthetic_scores: tuple[float, float] = AESTHETIC_SCORES,
    ) -> Tensor:
        """As `StableDiffusion_XL.compute_time_ids`, but (2, 5).

        aesthetic_scores: for the negative prompt and for the prompt, 0 … 10.
        """
        ids = [[*(original_size or size), *crop, score] for score in aesthetic_scores]
        return torch.tensor(ids, device=self.device, dtype=torch.float32)
