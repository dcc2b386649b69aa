"""A latent diffusion model (arXiv 2112.10752): a text encoder, a UNet that denoises latents, and an autoencoder.

Latents are (B, 4, H / 8, W / 8). Text embeddings are (2 P, L, D): those of P negative prompts, then of P prompts. The
other conditions that a model may have, such as the size of a picture, come in the same two halves.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

import refiners.fluxion.layers as fl
from refiners.fluxion.checks import height_and_width, in_eight_bits, instance_of, picture
from refiners.fluxion.context import Context
from refiners.fluxion.utils import image_to_tensor
from refiners.foundationals.latent_diffusion.autoencoder import LatentDiffusionAutoencoder
from refiners.foundationals.latent_diffusion.guidance import Guidance, Prediction
from refiners.foundationals.latent_diffusion.lora.loras import Scheduled
from refiners.foundationals.latent_diffusion.specs import StableDiffusionSpec
from refiners.foundationals.latent_diffusion.unet import UNet
from refiners.foundationals.latent_diffusion.unet_call import UNetCall, UNetRunner
from refiners.solvers import DPMSolver, Solver
from refiners.solvers.solver import Generators, unit_noise

DEFAULT_STEPS = 30


class LatentDiffusionModel(fl.Module, ABC):
    """From noise to latents, step by step, led by a text.

    unet, lda: None for new ones of the spec's sizes, on `device` and in `dtype`.
    solver: None for DPM-Solver++ with 30 steps.
    guidances: what is added to the prediction after classifier-free guidance, at every step.
    unet_runner: what calls the UNet in the model's place, such as `MultiDiffusion`; None for nothing.
    """

    def __init__(
        self,
        spec: StableDiffusionSpec,
        unet: UNet | None,
        lda: LatentDiffusionAutoencoder | None,
        solver: Solver | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.spec = spec
        for name, part, wanted in (("unet", unet, spec.unet), ("lda", lda, spec.autoencoder)):
            _check_part(name, part, wanted)
        self.unet = unet or UNet(spec.unet, device=device, dtype=dtype)
        self.lda = lda or LatentDiffusionAutoencoder(spec.autoencoder, device, spec.autoencoder.dtype_for(dtype))
        self.solver = solver or DPMSolver(DEFAULT_STEPS, params=spec.solver_params)
        self.guidances: list[Guidance] = []
        self.unet_runner: UNetRunner | None = None
        self._lora_schedules: dict[str, Scheduled] = {}

    if TYPE_CHECKING:

        def __call__(
            self,
            x: Tensor,
            step: int,
            *,
            clip_text_embedding: Tensor,
            condition_scale: float = 7.5,
            generator: Generators = None,
            **conditions: Tensor,
        ) -> Tensor: ...

    @property
    def device(self) -> torch.device:
        """Where the UNet lies."""
        return self.unet.device or torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the UNet."""
        return self.unet.dtype or torch.get_default_dtype()

    @property
    def steps(self) -> list[int]:
        """The solver's steps, in order."""
        return self.solver.inference_steps

    def set_num_inference_steps(self, num_steps: int) -> None:
        """Take as many steps from noise to picture. Raises ValueError unless it is 1 … 1000."""
        self.set_inference_steps(num_steps)

    def set_inference_steps(self, num_steps: int, first_step: int = 0) -> None:
        """Divide the way from noise to picture into steps, and leave out the first ones, to start from a picture."""
        self.solver = self.solver.rebuild(num_steps, first_inference_step=first_step)

    @contextmanager
    def unchanged(self) -> Generator[None]:
        """Inside `with`, the solver may be another one; afterwards it is the one from before."""
        solver = self.solver
        try:
            yield
        finally:
            self.solver = solver

    @abstractmethod
    def compute_conditions(
        self, text: str | Sequence[str], negative_text: str | Sequence[str] | None, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """All that `predict_noise` is to be given for P prompts, and as many negative ones or one for all.

        negative_text: None for what the model was trained with where there is none.
        size: height and width of the picture in pixels.
        """

    def forward(
        self,
        x: Tensor,
        step: int,
        *,
        clip_text_embedding: Tensor,
        condition_scale: float = 7.5,
        generator: Generators = None,
        **conditions: Tensor,
    ) -> Tensor:
        predicted_noise = self.predict_noise(x, step, clip_text_embedding, condition_scale, **conditions)
        return self.solver(x, predicted_noise, step=step, generator=generator)

    def predict_noise(
        self, x: Tensor, step: int, clip_text_embedding: Tensor, condition_scale: float = 7.5, **conditions: Tensor
    ) -> Tensor:
        """The UNet's prediction with classifier-free guidance (arXiv 2207.12598, eq. 6), both halves in one batch.

        x: (B, C, h, w) at the level of `step`.  clip_text_embedding: (2 B, L, D), or (2, L, D) for all B pictures.
        condition_scale: 1 is no guidance; the negative half is left out then, as it is if the UNet reads the scale.
        conditions: the others that the UNet asks for, each of batch 2 B or 2.
        """
        self.solver.check_step(step)
        index, count = step - self.solver.first_inference_step, len(self.steps)
        for participant in (*self._lora_schedules.values(), *self.unet.participants):
            participant.before_step(index, count)
        conditions = {"clip_text_embedding": clip_text_embedding, **conditions, **self.unet.adapter_conditions}
        conditions = {name: self._one_per_picture(x, condition, name) for name, condition in conditions.items()}
        reads_scale = "condition_scale" in self.spec.unet.conditions  # then the UNet was distilled to guide itself
        if condition_scale == 1 or reads_scale:
            conditions = {name: condition.chunk(2)[1] for name, condition in conditions.items()}
            if reads_scale:
                conditions["condition_scale"] = x.new_full((len(x),), condition_scale)
            negative, positive = None, self.run_unet(x, step, conditions)
            predicted = positive
        else:
            negative, positive = self.run_unet(torch.cat([x, x]), step, conditions, len(x)).chunk(2)
            predicted = negative + condition_scale * (positive - negative)
        if self.guidances:
            prediction = Prediction(x, step, index, count, negative, positive, conditions, self.run_unet)
            predicted = predicted + sum(guidance(prediction) for guidance in self.guidances)
        return predicted

    def run_unet(
        self,
        x: Tensor,
        step: int,
        conditions: Mapping[str, Tensor],
        negatives: int = 0,
        contexts: Mapping[str, Context] | None = None,
    ) -> Tensor:
        """What the UNet predicts for latents (B, C, h, w) at a step, with conditions of batch B; no guidance.

        negatives: how many of the batch, from its front, are for negative prompts; adapters find it in the context
            "diffusion".
        contexts: what adapters are to find besides, in this call only.
        """
        x = self._model_input(self.solver.scale_model_input(x, step))
        timestep = self.solver.timesteps[step].reshape(1).to(x.device)
        call = UNetCall(x, timestep, conditions, {"diffusion": {"negatives": negatives}, **(contexts or {})})
        return call.run(self.unet) if self.unet_runner is None else self.unet_runner.run(call)

    def _model_input(self, x: Tensor) -> Tensor:
        """What the UNet sees for latents x."""
        return x

    def _one_per_picture(self, x: Tensor, condition: Tensor, name: str) -> Tensor:
        found = instance_of(condition, Tensor, name, "a tensor, as compute_text_embedding makes it").shape[0]
        pictures = x.shape[0]
        if found not in (2, 2 * pictures):
            raise ValueError(
                f"{pictures} pictures need {name} of batch {2 * pictures} (negative prompts, then prompts) or 2, but "
                f"it is {found}: give one for all, or one for each"
            )
        return condition if found == 2 * pictures else condition.repeat_interleave(pictures, dim=0)

    def init_latents(
        self,
        size: tuple[int, int],
        init_image: Image.Image | None = None,
        noise: Tensor | None = None,
        generator: Generators = None,
        tile_size: int | None = None,
    ) -> Tensor:
        """Latents to start from, at the level of the first step: noise, or a picture with noise on it.

        size: height and width in pixels; `init_image` is resized to it.
        noise: (B, C, H / 8, W / 8) of unit variance; None draws it, for one picture or for each of several generators.
        tile_size: side in pixels of the tiles in which `init_image` is encoded, to save memory; None for whole.
        Raises ValueError if a side is not a multiple of the downsampling factor (8).
        """
        shape = self.latents_size(size)
        channels = self.lda.spec.latent_channels
        if noise is None:
            count = len(generator) if isinstance(generator, Sequence) else 1
            noise = unit_noise(self._like(count, shape), generator)
        elif instance_of(noise, Tensor, "the noise", "a tensor").shape[1:] != (channels, *shape):
            raise ValueError(
                f"the noise is {tuple(noise.shape)}, but latents of this size are (B, {channels}, {shape[0]}, "
                f"{shape[1]}): give such, or leave it out"
            )
        if init_image is None:
            return noise * self.solver.initial_noise_scale
        clean = self.lda.encode_image(resized(init_image, size), tile_size).to(noise).expand_as(noise)
        return self.solver.add_noise(clean, noise, step=self.solver.first_inference_step)

    def latents_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The height and width of latents for a picture's.

        Raises ValueError if they are not whole numbers, TypeError if `size` is not two whole numbers.
        """
        height, width = height_and_width(size)
        factor = self.lda.spec.downsampling_factor
        if height % factor or width % factor or height <= 0 or width <= 0:
            raise ValueError(
                f"a picture of {width}x{height} has no whole number of latents: sides must be multiples of {factor}, "
                f"such as {max(width // factor, 1) * factor}x{max(height // factor, 1) * factor}"
            )
        return height // factor, width // factor

    def prepare_mask(
        self,
        init_image: Image.Image,
        mask: Image.Image,
        size: tuple[int, int],
        noise: Tensor,
        tile_size: int | None = None,
    ) -> Callable[[Tensor, int], Tensor]:
        """Get ready to keep `init_image` where `mask` is black; returns what to do with x after each step.

        The kept part goes back to where it was, at the level of the next step; noise: what x started from.
        tile_size: as for `init_latents`.
        """
        kept = self.lda.encode_image(resized(init_image, size), tile_size).to(noise).expand_as(noise)
        is_new = functional.interpolate(mask_to_tensor(mask, init_image, size), size=noise.shape[2:]).to(noise)

        def keep(x: Tensor, step: int) -> Tensor:
            is_last = step == self.steps[-1]
            around = kept if is_last else self.solver.add_noise(kept, noise, step=step + 1)
            return is_new * x + (1 - is_new) * around

        return keep

    def _like(self, count: int, size: tuple[int, int]) -> Tensor:
        channels = self.lda.spec.latent_channels
        return torch.empty(count, channels, *size, device=self.device, dtype=self.dtype)


def _check_part(name: str, part: fl.Chain | None, wanted: Any) -> None:
    """Raises TypeError if a part of a model is no tree, ValueError if it has other sizes than the spec says."""
    if part is None or instance_of(part, fl.Chain, name, "the part itself, or leave it out").spec == wanted:
        return
    there = part.spec
    names = [each.name for each in fields(wanted) if getattr(there, each.name, None) != getattr(wanted, each.name)]
    raise ValueError(
        f"the {name} has {names[0]}={getattr(there, names[0], None)!r}, but the spec of the model says "
        f"{getattr(wanted, names[0])!r}: give a spec with that of the {name}, or another {name}"
    )


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture in RGB, of that height and width. Raises TypeError if it is none, or the size is not two numbers."""
    height, width = height_and_width(size)
    image = in_eight_bits(picture(image)).convert("RGB")
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def mask_to_tensor(mask: Image.Image, image: Image.Image, size: tuple[int, int]) -> Tensor:
    """A mask of a picture that is resized to `size`, as (1, 1, H, W): 1 where it is white, half or more, else 0.

    Raises ValueError if it has another size than the picture, or is not of mode 1, L, P or RGB without transparency.
    """
    height, width = size
    if picture(mask, "the mask").mode not in ("1", "L", "P", "RGB") or mask.has_transparency_data:
        raise ValueError(
            f"a mask is black and white, of mode 1, L, P or RGB and opaque, but this one is {mask.mode}: choose what "
            "counts, such as mask.convert('L') or, for what is opaque, mask.getchannel('A')"
        )
    if mask.size != image.size:
        raise ValueError(
            f"the mask is {mask.width}x{mask.height}, but the picture is {image.width}x{image.height}: resize one"
        )
    grey = mask.convert("L")
    if grey.size != (width, height):
        grey = grey.resize((width, height), Image.Resampling.NEAREST)
    return (image_to_tensor(grey) >= 0.5).float()
