"""Whole pictures of Stable Diffusion XL, its refiner and inpainting, against diffusers' pipelines on the same files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
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
from test_pipeline import SCHEDULERS, mask, mean_only, picture
from torch import Tensor

from refiners.foundationals.latent_diffusion import (
    StableDiffusion_XL,
    StableDiffusion_XL_Inpainting,
    StableDiffusion_XL_Refiner,
    StepReport,
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


class Latents(list[Tensor]):
    """Those after each step, kept by the callback of either side."""

    def keep_ours(self, report: StepReport) -> None:
        self.append(report.latents)

    def keep_theirs(self, pipeline: Any, index: int, timestep: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        self.append(kept["latents"])
        return kept


def relative_error(ours: Latents, theirs: Latents) -> float:
    """Of the last ones."""
    assert len(ours) == len(theirs)
    return ((ours[-1] - theirs[-1]).norm() / theirs[-1].norm()).item()


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
    latents, their_latents = Latents(), Latents()
    theirs = pipeline(
        callback_on_step_end=their_latents.keep_theirs,
        prompt=PROMPTS,
        negative_prompt=NEGATIVES,
        num_inference_steps=6,
        guidance_scale=5.0,
        height=64,
        width=72,
        generator=generators(3, 4),
        output_type="np",
    ).images
    ours = sdxl.generate(
        PROMPTS,
        NEGATIVES,
        seed=[3, 4],
        num_inference_steps=6,
        size=(64, 72),
        on_step=latents.keep_ours,
        show_progress=False,
    )
    assert relative_error(latents, their_latents) < 1e-4
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


@pytest.fixture(scope="module")
def refiner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("model") / "refiner", StableDiffusion_XL_Refiner)


@pytest.fixture(scope="module")
def refiner(refiner_folder: Path) -> StableDiffusion_XL_Refiner:
    refiner = StableDiffusion_XL.from_pretrained(refiner_folder)
    assert isinstance(refiner, StableDiffusion_XL_Refiner)
    return refiner


def scheduler(solver: str, config: Any) -> Any:
    name, options = SCHEDULERS[solver]
    return getattr(diffusers, name).from_config({**config, **options})


@pytest.mark.parametrize(
    ("solver", "start", "size"), [("dpm-solver", 0.7, (64, 64)), ("ddim", 0.45, (64, 64)), ("unipc", 0.8, (64, 72))]
)
def test_the_base_hands_over_to_the_refiner_as_in_diffusers(
    pipeline: Any,
    sdxl: StableDiffusion_XL,
    refiner_folder: Path,
    refiner: StableDiffusion_XL_Refiner,
    solver: str,
    start: float,
    size: tuple[int, int],
) -> None:
    before, refiner_pipeline = pipeline.scheduler, load_theirs(StableDiffusionXLImg2ImgPipeline, refiner_folder)
    pipeline.scheduler = scheduler(solver, before.config)
    refiner_pipeline.scheduler = scheduler(solver, before.config)
    settings: dict[str, Any] = {"prompt": PROMPTS, "negative_prompt": NEGATIVES, "num_inference_steps": 10}
    latents, their_latents = Latents(), Latents()
    height, width = size
    settings |= {"guidance_scale": 5.0, "callback_on_step_end": their_latents.keep_theirs}
    handed = pipeline(
        **settings, denoising_end=start, height=height, width=width, generator=generators(6, 7), output_type="latent"
    ).images
    pipeline.scheduler = before
    theirs = refiner_pipeline(
        **settings, denoising_start=start, image=handed, original_size=size, target_size=size, output_type="np"
    ).images
    solvers = sdxl.solver, refiner.solver
    ours = sdxl.generate(
        PROMPTS,
        NEGATIVES,
        seed=[6, 7],
        num_inference_steps=10,
        solver=solver,
        size=size,
        refiner=refiner,
        refiner_start=start,
        on_step=latents.keep_ours,
        show_progress=False,
    )
    assert relative_error(latents, their_latents) < 1e-4
    assert psnr(ours, torch.from_numpy(theirs)) > 50
    assert (sdxl.solver, refiner.solver) == solvers


def test_a_whole_number_of_heuns_steps_is_left_to_the_refiner(
    sdxl: StableDiffusion_XL, refiner: StableDiffusion_XL_Refiner
) -> None:
    reports: list[StepReport] = []
    sdxl.generate(
        "a cat", num_inference_steps=5, solver="heun", refiner=refiner, refiner_start=0.5, on_step=reports.append
    )
    models = [report.model for report in reports]
    assert [report.number for report in reports] == list(range(1, 10)) and reports[0].count == 9
    assert models.count(sdxl) % 2 == 0 and models == [sdxl] * models.count(sdxl) + [refiner] * models.count(refiner)


def test_the_refiner_keeps_what_the_mask_says(sdxl: StableDiffusion_XL, refiner: StableDiffusion_XL_Refiner) -> None:
    latents = Latents()
    settings: dict[str, Any] = {"init_image": picture(), "mask": mask(), "show_progress": False}
    settings |= {"num_inference_steps": 10, "strength": 0.9, "refiner": refiner}
    sdxl.generate("a cat", on_step=latents.keep_ours, **settings)
    assert len(latents) == 9
    with torch.no_grad():
        clean = refiner.lda.encode_image(picture())
    is_kept = torch.nn.functional.interpolate(
        (torch.from_numpy(np.array(mask()))[None, None] == 0).float(), size=(8, 8)
    )
    assert torch.equal(latents[-1] * is_kept, clean * is_kept)
    assert not torch.equal(latents[-1], clean)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refiner_start": 0.0}, r"refiner_start is 0\.0, but should be a share"),
        ({"refiner_start": 1.5}, r"refiner_start is 1\.5"),
        ({"refiner_start": float("nan")}, "refiner_start is nan"),
        ({"refiner_start": 0.9999}, "leaves none to the refiner"),
        ({"refiner_start": 0.0001}, "leaves none to the base"),
        ({"init_image": picture(), "strength": 0.1}, r"of which 1 are taken, .* leaves none to the base"),
        ({"condition_scale": float("inf")}, "condition_scale should be a finite number, but it is inf"),
    ],
)
def test_a_way_that_cannot_be_shared_is_refused(
    sdxl: StableDiffusion_XL, refiner: StableDiffusion_XL_Refiner, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sdxl.generate("a cat", num_inference_steps=10, refiner=refiner, show_progress=False, **settings)


def test_a_refiner_of_other_latents_or_training_is_refused(
    sdxl: StableDiffusion_XL, refiner: StableDiffusion_XL_Refiner
) -> None:
    spec = refiner.spec
    other = replace(spec, autoencoder=replace(spec.autoencoder, latent_scale=0.5))
    with pytest.raises(ValueError, match=r"has latent_scale 0\.5, but that of the model has 0\.13025"):
        sdxl.generate("a cat", refiner=StableDiffusion_XL_Refiner(spec=other))
    other = replace(spec, solver_params=replace(spec.solver_params, num_train_timesteps=500))
    with pytest.raises(ValueError, match=r"the refiner was trained with .*=500"):
        sdxl.generate("a cat", refiner=StableDiffusion_XL_Refiner(spec=other))


def test_inpainting_equals_diffusers(tmp_path: Path) -> None:
    inpainting_folder = small_folder(tmp_path / "inpainting", StableDiffusion_XL_Inpainting)
    model = StableDiffusion_XL.from_pretrained(inpainting_folder)
    assert isinstance(model, StableDiffusion_XL_Inpainting)
    pipeline = load_theirs(StableDiffusionXLInpaintPipeline, inpainting_folder)
    pipeline.vae.encode = mean_only(pipeline.vae.encode)
    latents, their_latents = Latents(), Latents()
    theirs = pipeline(
        "a cute cat",
        callback_on_step_end=their_latents.keep_theirs,
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
    settings: dict[str, Any] = {"seed": 5, "num_inference_steps": 5, "show_progress": False}
    ours = model.generate(
        "a cute cat", init_image=picture(), mask=mask(), strength=1, on_step=latents.keep_ours, **settings
    )
    assert relative_error(latents, their_latents) < 1e-4
    assert psnr(ours, torch.from_numpy(theirs)) > 50
    with pytest.raises(ValueError, match="must be told what to fill in"):  # what was filled in then is forgotten
        model.predict_noise(
            torch.zeros(1, 4, 8, 8), 0, condition_scale=1, **model.compute_conditions("a", "", (64, 64))
        )


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
