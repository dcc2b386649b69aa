"""Filling in where a mask is white: latents against diffusers', and masks that are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline
from diffusion_specimens import small_folder, small_model
from PIL import Image, ImageDraw
from torch import Tensor

from refiners.foundationals.latent_diffusion import StableDiffusion_1, StableDiffusion_1_Inpainting
from refiners.foundationals.latent_diffusion.model import mask_to_tensor

# diffusers' schedulers hand tensors to numpy in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def picture(size: tuple[int, int] = (72, 64)) -> Image.Image:
    noise = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
    return Image.fromarray(noise.numpy())


def drawn_mask(size: tuple[int, int] = (72, 64)) -> Image.Image:
    image = Image.new("L", size, 0)
    ImageDraw.Draw(image).ellipse((13, 7, 58, 44), fill=255)
    return image


def their_latents(cls: type[StableDiffusion_1], folder: Path, strength: float) -> Tensor:
    pipeline: Any = StableDiffusionInpaintPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(
        dict(pipeline.scheduler.config), steps_offset=1, clip_sample=False, set_alpha_to_one=True
    )
    pipeline.set_progress_bar_config(disable=True)
    encode = pipeline.vae.encode

    def encode_mean(x: Tensor) -> Any:  # diffusers draws a sample where we take the mean
        output = encode(x)
        output.latent_dist.sample = lambda generator=None: output.latent_dist.mean
        return output

    pipeline.vae.encode = encode_mean
    settings: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 4.0, "height": 64, "width": 72}
    generator = torch.Generator().manual_seed(2)
    images = {"image": picture(), "mask_image": drawn_mask()}
    return pipeline("a cat", strength=strength, generator=generator, output_type="latent", **images, **settings).images


@pytest.mark.parametrize("cls", [StableDiffusion_1, StableDiffusion_1_Inpainting])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_latents_equal_diffusers(tmp_path: Path, cls: type[StableDiffusion_1], strength: float) -> None:
    model, latents = cls.from_pretrained(small_folder(tmp_path / "sd", cls)), list[Tensor]()
    model.generate(
        "a cat",
        seed=2,
        solver="ddim",
        num_inference_steps=5,
        condition_scale=4.0,
        init_image=picture(),
        mask=drawn_mask(),
        strength=strength,
        on_step=lambda report: latents.append(report.latents),
        show_progress=False,
    )
    theirs = their_latents(cls, tmp_path / "sd", strength)
    assert (latents[-1] - theirs).norm() / theirs.norm() < 1e-4


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_a_mask_may_be_of_any_opaque_mode_and_counts_from_half_on(mode: str) -> None:
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    levels = grey.point(lambda level: 255 if level >= 128 else 0) if mode == "1" else grey
    found = mask_to_tensor(levels.convert(mode), picture((16, 16)), (16, 16))
    expected = (torch.arange(256) >= 128).float().reshape(1, 1, 16, 16)
    assert (found - expected).abs().sum() <= (2 if mode == "P" else 0)  # a palette has not all greys


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "CMYK", "F", "I;16"])
def test_a_mask_whose_meaning_is_unclear_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=rf"mode 1, L, P or RGB and opaque, but this one is {mode}"):
        small_model().generate("a cat", init_image=picture(), mask=Image.new(mode, (72, 64)), num_inference_steps=1)


@pytest.mark.parametrize("cls", [StableDiffusion_1, StableDiffusion_1_Inpainting])
def test_a_mask_of_another_size_than_the_picture_is_refused(cls: type[StableDiffusion_1]) -> None:
    with pytest.raises(ValueError, match="the mask is 64x64, but the picture is 72x64"):
        small_model(cls).generate("a cat", init_image=picture(), mask=drawn_mask((64, 64)), num_inference_steps=1)


@torch.no_grad()
def test_picture_and_mask_are_resized_together() -> None:
    model = small_model()
    noise = torch.randn(1, 4, 8, 8)
    small = drawn_mask((128, 96)).resize((64, 64), Image.Resampling.NEAREST)
    small_picture = picture((128, 96)).resize((64, 64), Image.Resampling.LANCZOS)
    x = torch.randn(1, 4, 8, 8)
    keep = model.prepare_mask(picture((128, 96)), drawn_mask((128, 96)), (64, 64), noise)
    expected = model.prepare_mask(small_picture, small, (64, 64), noise)
    assert torch.equal(keep(x, model.steps[-1]), expected(x, model.steps[-1]))
