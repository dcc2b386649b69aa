"""Whole pictures of Stable Diffusion XL, its refiner and inpainting, against diffusers' pipelines on the same files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusion_specimens import SPECS, generators, psnr, randomize, small_folder
from test_pipeline import mask, mean_only, picture
from torch import Tensor

from refiners.foundationals.latent_diffusion import (
    StableDiffusion_XL,
    StableDiffusion_XL_Inpainting,
    StableDiffusion_XL_Refiner,
)
from refiners.solvers import Euler, TimestepSpacing

# diffusers' schedulers hand tensors to numpy in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS, NEGATIVES = ["a cute cat", "two dogs, oil painting"], ["blurry", "ugly"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("model") / "sdxl", StableDiffusion_XL)


@pytest.fixture(scope="module")
def sdxl(folder: Path) -> StableDiffusion_XL:
    return StableDiffusion_XL.from_pretrained(folder)


def load_theirs(cls: Any, folder: Path) -> Any:
    pipeline: Any = cls.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return load_theirs(StableDiffusionXLPipeline, folder)


@torch.no_grad()
def run(model: StableDiffusion_XL, x: Tensor, steps: Sequence[int], time_ids: Tensor | None = None) -> Tensor:
    """The loop, as users write it."""
    embedding, pooled = model.compute_clip_text_embedding("a cat", "a dog")
    for step in steps:
        x = model(
            x,
            step=step,
            clip_text_embedding=embedding,
            pooled_text_embedding=pooled,
            time_ids=model.default_time_ids if time_ids is None else time_ids,
            condition_scale=5.0,
        )
    return x


def test_text_to_image_equals_diffusers(pipeline: Any, sdxl: StableDiffusion_XL) -> None:
    theirs = pipeline(
        PROMPTS,
        negative_prompt=NEGATIVES,
        num_inference_steps=6,
        guidance_scale=5.0,
        height=64,
        width=72,
        generator=generators(3, 4),
        output_type="np",
    ).images
    ours = sdxl.generate(PROMPTS, NEGATIVES, seed=[3, 4], num_inference_steps=6, size=(64, 72), show_progress=False)
    assert psnr(ours, torch.from_numpy(theirs)) > 50


def test_no_negative_prompt_is_zeros_as_in_diffusers(pipeline: Any, sdxl: StableDiffusion_XL) -> None:
    theirs = pipeline(
        "a cat", num_inference_steps=3, height=64, width=64, generator=generators(1), output_type="np"
    ).images
    settings: dict[str, Any] = {"seed": 1, "num_inference_steps": 3, "show_progress": False}
    assert psnr(sdxl.generate("a cat", None, **settings), torch.from_numpy(theirs)) > 50
    assert psnr(sdxl.generate("a cat", "", **settings), torch.from_numpy(theirs)) < 50


def test_the_loop_with_other_time_ids_equals_diffusers(pipeline: Any, sdxl: StableDiffusion_XL) -> None:
    theirs = pipeline(
        "a cat",
        negative_prompt="a dog",
        num_inference_steps=4,
        height=64,
        width=64,
        original_size=(512, 400),
        crops_coords_top_left=(8, 100),
        negative_original_size=(512, 400),
        negative_crops_coords_top_left=(8, 100),
        negative_target_size=(64, 64),
        generator=generators(2),
        output_type="np",
    ).images
    other = sdxl.structural_copy()
    other.set_num_inference_steps(4)
    x = other.init_latents((64, 64), generator=generators(2))
    x = run(other, x, other.steps, other.compute_time_ids((64, 64), original_size=(512, 400), crop=(8, 100)))
    ours = other.lda.latents_to_images(x)
    assert psnr(ours, torch.from_numpy(theirs)) > 50
    assert other.default_time_ids.tolist() == [[64, 64, 0, 0, 64, 64]] * 2


def test_the_base_hands_over_to_the_refiner_as_in_diffusers(
    pipeline: Any, sdxl: StableDiffusion_XL, tmp_path: Path
) -> None:
    refiner_folder = small_folder(tmp_path / "refiner", StableDiffusion_XL_Refiner)
    refiner = StableDiffusion_XL.from_pretrained(refiner_folder)
    assert isinstance(refiner, StableDiffusion_XL_Refiner)
    refiner_pipeline = load_theirs(StableDiffusionXLImg2ImgPipeline, refiner_folder)
    settings: dict[str, Any] = {"prompt": "a cat", "negative_prompt": "a dog", "num_inference_steps": 10}
    latents = pipeline(
        **settings, denoising_end=0.7, height=64, width=64, generator=generators(6), output_type="latent"
    ).images
    theirs = refiner_pipeline(
        **settings, guidance_scale=5.0, denoising_start=0.7, image=latents, output_type="np"
    ).images
    base = sdxl.structural_copy()
    base.set_num_inference_steps(10)
    refiner.set_inference_steps(10, first_step=7)
    x = run(base, base.init_latents((64, 64), generator=generators(6)), base.steps[:7])
    ours = refiner.lda.latents_to_images(run(refiner, x, refiner.steps))
    assert psnr(ours, torch.from_numpy(theirs)) > 50


def test_inpainting_equals_diffusers(tmp_path: Path) -> None:
    inpainting_folder = small_folder(tmp_path / "inpainting", StableDiffusion_XL_Inpainting)
    model = StableDiffusion_XL.from_pretrained(inpainting_folder)
    assert isinstance(model, StableDiffusion_XL_Inpainting)
    pipeline = load_theirs(StableDiffusionXLInpaintPipeline, inpainting_folder)
    pipeline.vae.encode = mean_only(pipeline.vae.encode)
    theirs = pipeline(
        "a cute cat",
        negative_prompt="",
        image=picture(),
        mask_image=mask(),
        height=64,
        width=64,
        strength=1.0,
        guidance_scale=5.0,
        num_inference_steps=5,
        generator=generators(5),
        output_type="np",
    ).images
    ours = model.generate(
        "a cute cat", seed=5, num_inference_steps=5, init_image=picture(), mask=mask(), strength=1, show_progress=False
    )
    assert psnr(ours, torch.from_numpy(theirs)) > 50


def test_a_distilled_model_reads_the_scale_of_guidance_as_in_diffusers(tmp_path: Path) -> None:
    spec = SPECS[StableDiffusion_XL]
    torch.manual_seed(0)
    distilled = StableDiffusion_XL(spec=replace(spec, unet=replace(spec.unet, guidance_waves=12)))
    randomize(distilled)
    distilled.save_pretrained(tmp_path / "lcm")
    distilled.save_pretrained(tmp_path / "lcm.safetensors")
    pipeline = load_theirs(StableDiffusionXLPipeline, tmp_path / "lcm")
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    settings: dict[str, Any] = {"num_inference_steps": 4, "height": 64, "width": 64, "output_type": "np"}
    theirs = pipeline("a cat", guidance_scale=8.0, generator=generators(3), **settings).images
    other = pipeline("a cat", guidance_scale=2.0, generator=generators(3), **settings).images
    ours = StableDiffusion_XL.from_pretrained(tmp_path / "lcm").generate(
        "a cat", seed=3, num_inference_steps=4, condition_scale=8.0, solver="lcm", show_progress=False
    )
    assert psnr(ours, torch.from_numpy(theirs)) > 50 > psnr(ours, torch.from_numpy(other))
    again = StableDiffusion_XL.from_pretrained(tmp_path / "lcm.safetensors", spec=distilled.spec)
    assert all(map(torch.equal, again.state_dict().values(), distilled.state_dict().values()))


@pytest.mark.parametrize("count", [1, 4])
def test_few_steps_without_guidance_equal_diffusers(pipeline: Any, sdxl: StableDiffusion_XL, count: int) -> None:
    """As Turbo, Lightning and Hyper-SD are sampled: Euler, trailing timesteps, and no negative prompt."""
    before = pipeline.scheduler
    pipeline.scheduler = EulerDiscreteScheduler.from_config(before.config, timestep_spacing="trailing")
    theirs = pipeline(
        "a cat",
        guidance_scale=0.0,
        num_inference_steps=count,
        height=64,
        width=64,
        generator=generators(3),
        output_type="np",
    ).images
    pipeline.scheduler = before
    solver = Euler(count, params=replace(sdxl.spec.solver_params, timesteps_spacing=TimestepSpacing.TRAILING))
    ours = sdxl.generate(
        "a cat", seed=3, num_inference_steps=count, condition_scale=1.0, solver=solver, show_progress=False
    )
    assert psnr(ours, torch.from_numpy(theirs)) > 50
