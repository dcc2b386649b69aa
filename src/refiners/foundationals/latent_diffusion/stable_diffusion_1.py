"""Stable Diffusion 1 (arXiv 2112.10752), and its form that was trained to fill in."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from refiners.fluxion.utils import image_to_tensor
from refiners.foundationals.clip.prompts import encode_prompt
from refiners.foundationals.clip.text_encoder import CLIPTextEncoder
from refiners.foundationals.clip.tokenizer import CLIPTokenizer
from refiners.foundationals.latent_diffusion import pretrained
from refiners.foundationals.latent_diffusion.autoencoder import LatentDiffusionAutoencoder
from refiners.foundationals.latent_diffusion.generation import TextToImage
from refiners.foundationals.latent_diffusion.loras import Loras
from refiners.foundationals.latent_diffusion.model import mask_to_tensor, resized
from refiners.foundationals.latent_diffusion.specs import SD1, SD1_INPAINTING, StableDiffusionSpec
from refiners.foundationals.latent_diffusion.unet import UNet
from refiners.solvers import Solver


class StableDiffusion_1(TextToImage):
    """Text to image.

        embedding = sd15.compute_text_embedding("a cute cat")
        x = sd15.init_latents((512, 512))
        for step in sd15.steps:
            x = sd15(x, step=step, clip_text_embedding=embedding, condition_scale=7.5)
        image = sd15.lda.decode_latents(x)

    `generate` does all of that in one call; `from_pretrained` makes one from files.

    unet, lda, clip_text_encoder: None for new ones of the spec's sizes, on `device` and in `dtype`.
    solver: None for DPM-Solver++ with 30 steps.
    spec: None for Stable Diffusion 1.5's.
    """

    default_spec: ClassVar[StableDiffusionSpec] = SD1

    def __init__(
        self,
        unet: UNet | None = None,
        lda: LatentDiffusionAutoencoder | None = None,
        clip_text_encoder: CLIPTextEncoder | None = None,
        solver: Solver | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        spec: StableDiffusionSpec | None = None,
    ) -> None:
        spec = spec or self.default_spec
        super().__init__(spec, unet, lda, solver, device, dtype)
        if clip_text_encoder is None:
            text = spec.text_encoder
            tokenizer = CLIPTokenizer(spec.vocabulary, text.max_sequence_length, text.pad_token_id)
            clip_text_encoder = CLIPTextEncoder(text, tokenizer, device=device, dtype=dtype)
        self.clip_text_encoder = clip_text_encoder

    @property
    def loras(self) -> Loras:
        """The weight updates (LoRA and its kin) on this model, by name."""
        return Loras(self, self._lora_schedules)

    @classmethod
    def from_pretrained(
        cls,
        where: Path | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        spec: StableDiffusionSpec | None = None,
    ) -> Self:
        """Load a model whole, or not at all; one whose UNet takes 9 channels as `StableDiffusion_1_Inpainting`.

        where: a folder in diffusers' layout; a folder of our own files, one for each part; a single `.safetensors` or
            `.ckpt` file, as on Civitai; the name of a repository on the Hugging Face hub, which is fetched once and
            then found in the hub's cache; or "builtin", the small model that comes with the package.
        dtype: None for torch's default, whatever the files hold.
        revision: a branch, tag or commit of a repository.
        spec: the sizes; None takes them from a folder's configuration, and for a single file those of this class.
        Raises ValueError for files that are damaged or of another model, FileNotFoundError if there are none.
        """
        source = pretrained.find_source(where, revision)
        spec = spec or source.spec(cls.default_spec)
        is_inpainting = spec.unet.in_channels == SD1_INPAINTING.unet.in_channels
        model: Any = (StableDiffusion_1_Inpainting if is_inpainting else cls)(device="meta", spec=spec)
        tensors = source.read(spec, {name: tensor.shape for name, tensor in model.state_dict().items()})
        pretrained.fill(model, tensors, torch.device(device or "cpu"), dtype or torch.get_default_dtype())
        return model

    def save_pretrained(self, where: Path | str, dtype: torch.dtype | None = None) -> None:
        """Save the model so that `from_pretrained`, and diffusers, can load it.

        where: a name that ends in `.safetensors` for a single file with the original names, else a folder.
        dtype: of the saved tensors, None for that of the model.
        Adapters are not saved, only the model below them.
        """
        adapted = self.state_dict()
        base = type(self)(device="meta", spec=self.spec).state_dict()
        pretrained.save(where, self.spec, {name: adapted[name] for name in base}, dtype)

    def compute_text_embedding(self, text: str | Sequence[str], negative_text: str | Sequence[str] = "") -> Tensor:
        """Encode P prompts, and as many negative ones or one for all: (2 P, L, D), the negative ones first.

        `(word:1.3)` counts more, and long prompts take as many chunks of 77 tokens as they need: see
        `refiners.foundationals.clip.encode_prompt`. Raises ValueError if there are no prompts, or the numbers differ.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        negatives = [negative_text] if isinstance(negative_text, str) else list(negative_text)
        if len(negatives) == 1:
            negatives *= len(prompts)
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(negatives)} negative ones: give one, or one for each")
        return encode_prompt(self.clip_text_encoder, [*negatives, *prompts])

    def compute_conditions(
        self, text: str | Sequence[str], negative_text: str | Sequence[str], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """The text embedding alone, whatever the size is."""
        return {"clip_text_embedding": self.compute_text_embedding(text, negative_text)}

    compute_clip_text_embedding = compute_text_embedding  # as in later versions of the first refiners

    def structural_copy(self) -> Self:
        """The same weights in trees of its own: what adapts one copy does not touch the other."""
        return type(self)(
            unet=self.unet.structural_copy(),
            lda=self.lda.structural_copy(),
            clip_text_encoder=self.clip_text_encoder.structural_copy(),
            solver=self.solver.rebuild(self.solver.num_inference_steps),
            spec=self.spec,
        )


class StableDiffusion_1_Inpainting(StableDiffusion_1):
    """Stable Diffusion 1 trained to fill in: its UNet also sees the mask and what is outside of it (9 channels)."""

    default_spec: ClassVar[StableDiffusionSpec] = SD1_INPAINTING
    _conditions: Tensor | None = None

    def set_inpainting_conditions(
        self, target_image: Image.Image, mask: Image.Image, latents_size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Say what to fill in: where `mask` is white, half or more; it stays until other conditions are set.

        latents_size: height and width of the latents; None takes them from the picture, which else is resized.
        Returns the mask (1, 1, h, w), 1 where to fill in, and the latents of the rest (1, 4, h, w).
        """
        factor = self.lda.spec.downsampling_factor
        height, width = latents_size or self.latents_size((target_image.height, target_image.width))
        size = (height * factor, width * factor)
        pixels = image_to_tensor(resized(target_image, size), device=self.device, dtype=self.dtype) * 2 - 1
        is_new = mask_to_tensor(mask, size).to(pixels)
        mask_latents = functional.interpolate(is_new, size=(height, width))
        target_latents = self.lda.encode(pixels * (1 - is_new))
        self._conditions = torch.cat([mask_latents, target_latents], dim=1)
        return mask_latents, target_latents

    def prepare_mask(
        self, init_image: Image.Image, mask: Image.Image, size: tuple[int, int], noise: Tensor
    ) -> Callable[[Tensor, int], Tensor]:
        """Set the inpainting conditions; nothing is to be done with x after a step."""
        self.set_inpainting_conditions(init_image, mask, self.latents_size(size))
        return lambda x, step: x

    def _model_input(self, x: Tensor) -> Tensor:
        if self._conditions is None:
            raise ValueError("an inpainting model must be told what to fill in: call set_inpainting_conditions first")
        if self._conditions.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"the inpainting conditions are for latents of {tuple(self._conditions.shape[2:])}, but these are "
                f"{tuple(x.shape[2:])}: set them for this size"
            )
        return torch.cat([x, self._conditions.expand(x.shape[0], -1, -1, -1)], dim=1)
