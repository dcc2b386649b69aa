"""Stable Diffusion 1 (arXiv 2112.10752), and its form that was trained to fill in."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from refiners.foundationals.clip.prompts import encode_prompt
from refiners.foundationals.clip.text_encoder import CLIPTextEncoder
from refiners.foundationals.latent_diffusion.inpainting import Inpainting
from refiners.foundationals.latent_diffusion.specs import SD1, SD1_INPAINTING, StableDiffusionSpec
from refiners.foundationals.latent_diffusion.stable_diffusion import StableDiffusion, pair_prompts


class StableDiffusion_1(StableDiffusion[CLIPTextEncoder]):
    """Text to image.

        embedding = sd15.compute_text_embedding("a cute cat")
        x = sd15.init_latents((512, 512))
        for step in sd15.steps:
            x = sd15(x, step=step, clip_text_embedding=embedding, condition_scale=7.5)
        image = sd15.lda.decode_latents(x)

    `generate` does all of that in one call; `from_pretrained` makes one from files.
    """

    default_spec: ClassVar[StableDiffusionSpec | None] = SD1

    def compute_text_embedding(self, text: str | Sequence[str], negative_text: str | Sequence[str] = "") -> Tensor:
        """Encode P prompts, and as many negative ones or one for all: (2 P, L, D), the negative ones first.

        `(word:1.3)` counts more, and long prompts take as many chunks of 77 tokens as they need: see
        `refiners.foundationals.clip.encode_prompt`. Raises ValueError if there are no prompts, or the numbers differ.
        """
        return encode_prompt(self.clip_text_encoder, pair_prompts(text, negative_text))

    def compute_conditions(
        self, text: str | Sequence[str], negative_text: str | Sequence[str] | None, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """The text embedding alone, whatever the size is; no negative prompt is an empty one."""
        return {"clip_text_embedding": self.compute_text_embedding(text, negative_text or "")}

    compute_clip_text_embedding = compute_text_embedding  # as in later versions of the first refiners


class StableDiffusion_1_Inpainting(Inpainting, StableDiffusion_1):
    """Stable Diffusion 1 trained to fill in."""

    default_spec: ClassVar[StableDiffusionSpec | None] = SD1_INPAINTING
