"""Whole pictures, prompt in and picture out, against diffusers' pipelines on the same files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusion_specimens import generators, psnr, small_folder
from PIL import Image, ImageDraw

from refiners.foundationals.latent_diffusion import (
    GenerationCancelled,
    StableDiffusion_1,
    StableDiffusion_1_Inpainting,
    StepReport,
)

# diffusers' schedulers hand tensors to numpy in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm-solver": ("DPMSolverMultistepScheduler", {}),
    "ddim": ("DDIMScheduler", {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": True}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    "heun": ("HeunDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("model") / "sd")


@pytest.fixture(scope="module")
def sd15(folder: Path) -> StableDiffusion_1:
    return StableDiffusion_1.from_pretrained(folder)


def reference(cls: Any, folder: Path, solver: str = "dpm-solver") -> Any:
    pipeline: Any = cls.from_pretrained(folder)
    name, options = SCHEDULERS[solver]
    pipeline.scheduler = getattr(diffusers, name).from_config({**dict(pipeline.scheduler.config), **options})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture() -> Image.Image:
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
    image = Image.fromarray(noise.numpy())
    ImageDraw.Draw(image).ellipse((10, 20, 40, 60), fill=(200, 30, 90))
    return image


def mask() -> Image.Image:
    image = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(image).rectangle((24, 8, 55, 47), fill=255)
    return image


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_text_to_image_equals_diffusers(folder: Path, sd15: StableDiffusion_1, solver: str) -> None:
    theirs = reference(StableDiffusionPipeline, folder, solver)(
        ["a cute cat", "two dogs, oil painting"],
        negative_prompt=["blurry", "ugly"],
        num_inference_steps=7,
        guidance_scale=5.0,
        height=64,
        width=72,
        generator=generators(3, 4),
        output_type="np",
    ).images
    ours = sd15.generate(
        ["a cute cat", "two dogs, oil painting"],
        ["blurry", "ugly"],
        seed=[3, 4],
        num_inference_steps=7,
        condition_scale=5.0,
        solver=solver,
        size=(64, 72),
        show_progress=False,
    )
    assert psnr(ours, torch.from_numpy(theirs)) > 50


def test_no_guidance_equals_diffusers(folder: Path, sd15: StableDiffusion_1) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 4}
    theirs = reference(StableDiffusionPipeline, folder)(
        "a cat", guidance_scale=1.0, height=64, width=64, generator=generators(1), output_type="np", **settings
    ).images
    ours = sd15.generate("a cat", seed=1, condition_scale=1.0, show_progress=False, **settings)
    assert psnr(ours, torch.from_numpy(theirs)) > 50


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("solver", ["dpm-solver", "euler"])
def test_image_to_image_equals_diffusers(folder: Path, sd15: StableDiffusion_1, strength: float, solver: str) -> None:
    image = picture()
    with torch.no_grad():
        clean = sd15.lda.encode_image(image)
    theirs = reference(StableDiffusionImg2ImgPipeline, folder, solver)(
        "a cute cat",
        image=clean,  # as latents: diffusers would draw a sample where we take the mean
        strength=strength,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    sd15.solver = sd15._solver_for(solver, 10, strength)
    x = sd15.init_latents((64, 64), image, noise)
    with torch.no_grad():
        embedding = sd15.compute_text_embedding("a cute cat")
        for step in sd15.steps:
            x = sd15(x, step=step, clip_text_embedding=embedding)
        ours = sd15.lda.latents_to_images(x)
    assert psnr(ours, torch.from_numpy(theirs)) > 50
    if strength < 1:
        at_once = sd15.generate(
            "a cute cat", seed=5, solver=solver, num_inference_steps=10, init_image=image, strength=strength
        )
        assert psnr(at_once, torch.from_numpy(theirs)) > 50


def test_any_model_keeps_what_the_mask_says_as_in_diffusers(folder: Path, sd15: StableDiffusion_1) -> None:
    image = picture()
    pipeline = reference(StableDiffusionInpaintPipeline, folder, "euler")
    pipeline.vae.encode = mean_only(pipeline.vae.encode)
    theirs = pipeline(
        "a cute cat",
        image=image,
        mask_image=mask(),
        height=64,
        width=64,
        strength=0.8,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    ours = sd15.generate(
        "a cute cat", seed=5, solver="euler", num_inference_steps=10, init_image=image, mask=mask(), strength=0.8
    )
    assert psnr(ours, torch.from_numpy(theirs)) > 50


def mean_only(encode: Callable[..., Any]) -> Callable[..., Any]:
    """diffusers draws samples of latents; let it take their mean, as we do."""

    def encode_mean(x: torch.Tensor) -> Any:
        output = encode(x)
        output.latent_dist.sample = lambda generator=None: output.latent_dist.mean
        return output

    return encode_mean


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_the_inpainting_model_equals_diffusers(tmp_path: Path, strength: float) -> None:
    folder = small_folder(tmp_path / "inpainting", StableDiffusion_1_Inpainting)
    ours = StableDiffusion_1_Inpainting.from_pretrained(folder)
    pipeline = reference(StableDiffusionInpaintPipeline, folder)
    pipeline.vae.encode = mean_only(pipeline.vae.encode)
    theirs = pipeline(
        "a cute cat",
        image=picture(),
        mask_image=mask(),
        height=64,
        width=64,
        strength=strength,
        num_inference_steps=6,
        generator=torch.Generator().manual_seed(2),
        output_type="np",
    ).images
    images = ours.generate(
        "a cute cat", seed=2, num_inference_steps=6, init_image=picture(), mask=mask(), strength=strength
    )
    assert psnr(images, torch.from_numpy(theirs)) > 50


def test_a_picture_depends_on_its_own_prompt_and_seed_only(sd15: StableDiffusion_1) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 3, "solver": "euler-ancestral", "show_progress": False}
    together = sd15.generate(["a cat", "a dog"], seed=[7, 8], **settings)
    alone = sd15.generate("a dog", seed=8, **settings)
    assert psnr([together[1]], torch.from_numpy(as_array(alone[0]))[None]) > 55
    assert psnr([together[0]], torch.from_numpy(as_array(alone[0]))[None]) < 40


def as_array(image: Image.Image) -> Any:
    return np.asarray(image).astype("float32") / 255


def test_the_callback_sees_every_step_and_can_stop(sd15: StableDiffusion_1) -> None:
    reports: list[StepReport] = []

    def watch(report: StepReport) -> bool:
        reports.append(report)
        return report.number < 3

    solver = sd15.solver
    with pytest.raises(GenerationCancelled, match="after step 3 of 5"):
        sd15.generate("a cat", num_inference_steps=5, on_step=watch)
    assert [report.number for report in reports] == [1, 2, 3]
    assert reports[0].preview()[0].size == (64, 64)
    assert sd15.solver is solver


def test_the_last_clean_prediction_is_the_picture(sd15: StableDiffusion_1) -> None:
    previews: list[Any] = []
    images = sd15.generate("a cat", num_inference_steps=3, on_step=lambda report: previews.append(report.preview()))
    assert psnr(images, torch.from_numpy(as_array(previews[-1][0]))[None]) > 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": (60, 64)}, r"64x60 .* multiples of 8, such as 64x56"),
        ({"solver": "dpm++"}, r"no solver 'dpm\+\+'; choose from ddim"),
        ({"seed": [1, 2, 3], "prompt": ["a", "b"]}, "2 prompts, 1 negative prompts and 3 seeds"),
        ({"strength": 0.0, "init_image": Image.new("RGB", (64, 64))}, "strength is 0.0"),
        ({"mask": Image.new("L", (64, 64))}, "there is none: give both"),
        ({"num_inference_steps": 0}, "from 1 to 1000, but it is 0"),
        ({"prompt": []}, "0 prompts"),
        ({"tile_size": 8}, "tiles need at least 32"),
    ],
)
def test_settings_that_do_not_fit_are_refused(sd15: StableDiffusion_1, settings: dict[str, Any], message: str) -> None:
    solver = sd15.solver
    with pytest.raises(ValueError, match=message):
        sd15.generate(**{"prompt": "a cat", "num_inference_steps": 2, **settings})
    assert sd15.solver is solver


def test_an_empty_prompt_is_a_prompt(sd15: StableDiffusion_1) -> None:
    assert sd15.generate("", num_inference_steps=1, show_progress=False)[0].size == (64, 64)


def test_a_text_embedding_of_the_wrong_batch_is_refused(sd15: StableDiffusion_1) -> None:
    with pytest.raises(ValueError, match=r"3 pictures need clip_text_embedding of batch 6 .* or 2, but it is 4"):
        sd15(torch.zeros(3, 4, 8, 8), step=0, clip_text_embedding=torch.zeros(4, 77, 32))


def test_an_inpainting_model_asks_for_its_conditions() -> None:
    model = StableDiffusion_1_Inpainting(device="meta")
    with pytest.raises(ValueError, match="call set_inpainting_conditions first"):
        model._model_input(torch.zeros(1, 4, 8, 8))


def test_copies_share_weights_and_can_be_adapted_apart(sd15: StableDiffusion_1) -> None:
    copy = sd15.structural_copy()
    assert copy.unet is not sd15.unet
    ours, theirs = dict(sd15.named_parameters()), dict(copy.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
