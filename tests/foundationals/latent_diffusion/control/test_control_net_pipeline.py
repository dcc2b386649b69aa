"""Whole pictures led by ControlNets, prompt in and picture out, against diffusers' pipelines on the same files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from control_specimens import randomize, relative_error, their_control_net
from diffusion_specimens import generators, small_folder
from lora_specimens import kohya_tensors, merge, random_factors, write
from PIL import Image
from torch import Tensor

from refiners.foundationals.latent_diffusion import StableDiffusion_1, StableDiffusion_XL
from refiners.foundationals.latent_diffusion.control import ControlNetAdapter

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CHANNELS = (8, 8, 12, 16)  # of the encoder of the condition
PIPELINES: dict[Any, Any] = {
    StableDiffusion_1: diffusers.StableDiffusionControlNetPipeline,
    StableDiffusion_XL: diffusers.StableDiffusionXLControlNetPipeline,
}
PROMPT: dict[str, Any] = {"prompt": "a cute cat", "negative_prompt": "blurry", "num_inference_steps": 6}


@pytest.fixture(scope="module", params=PIPELINES, ids=lambda cls: cls.__name__)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of ours, diffusers' pipeline with two ControlNets, and the folder that all was loaded from."""
    cls, path = request.param, tmp_path_factory.mktemp("model")
    small_folder(path / "sd", cls)
    ours = cls.from_pretrained(path / "sd")
    control_nets: list[Any] = []
    for index in range(2):
        control_nets.append(their_control_net(ours.spec.unet, CHANNELS))
        randomize(control_nets[-1], seed=index)
        control_nets[-1].save_pretrained(path / f"control_{index}")
    pipeline = PIPELINES[cls].from_pretrained(path / "sd", controlnet=control_nets)
    pipeline.set_progress_bar_config(disable=True)
    return ours, pipeline, path


def conditions() -> list[Image.Image]:
    pixels = torch.randint(0, 256, (2, 64, 72, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
    return [Image.fromarray(each.numpy()) for each in pixels]


def their_latents(pipeline: Any, scales: list[float], **options: Any) -> Tensor:
    return pipeline(
        image=conditions(),
        controlnet_conditioning_scale=scales,
        guidance_scale=5.0,
        generator=generators(3)[0],
        output_type="latent",
        **PROMPT,
        **options,
    ).images


def latents(model: Any) -> Tensor:
    """What the last step gives."""
    found: list[Tensor] = []
    model.generate(
        **PROMPT,
        seed=3,
        condition_scale=5.0,
        size=(64, 72),
        on_step=lambda report: found.append(report.latents),
        show_progress=False,
    )
    return found[-1]


@contextmanager
def led(model: Any, path: Path, scales: list[float], **options: Any) -> Iterator[None]:
    """Two ControlNets on the model, the second one with the options."""
    first = ControlNetAdapter(model, path / "control_0", scale=scales[0]).inject()
    second = ControlNetAdapter(model, path / "control_1", scale=scales[1], **options).inject()
    for adapter, condition in zip((first, second), conditions(), strict=True):
        adapter.set_controlnet_condition(condition)
    yield
    first.eject()
    second.eject()


def test_pictures_led_by_two_equal_diffusers(both: Any) -> None:
    model, pipeline, path = both
    before = latents(model)
    with led(model, path, [0.5, 0.3]):
        ours = latents(model)
    assert relative_error(ours, their_latents(pipeline, [0.5, 0.3])) < 1e-4
    assert relative_error(ours, before) > 1e-2
    assert torch.equal(latents(model), before)


def test_pictures_led_in_a_part_of_the_steps_equal_diffusers(both: Any) -> None:
    model, pipeline, path = both
    with led(model, path, [0.5, 0.3], start=0.2, end=0.7):
        ours = latents(model)
    theirs = their_latents(pipeline, [0.5, 0.3], control_guidance_start=[0.0, 0.2], control_guidance_end=[1.0, 0.7])
    assert relative_error(ours, theirs) < 1e-4
    with led(model, path, [0.5, 0.3]):
        assert relative_error(latents(model), theirs) > 1e-3


@pytest.mark.parametrize("both", [StableDiffusion_1], indirect=True)
def test_pictures_led_by_a_controlnet_and_a_lora_equal_diffusers(both: Any, tmp_path: Path) -> None:
    model, pipeline, path = both
    factors = random_factors(pipeline)
    merge(pipeline, factors)
    theirs = their_latents(pipeline, [0.5, 0.0])
    name = model.loras.add(write(tmp_path / "style.safetensors", kohya_tensors(factors))).name
    with led(model, path, [0.5, 0.0]):
        assert relative_error(latents(model), theirs) < 1e-4
        model.loras.set_scale(name, 0.0)
        assert relative_error(latents(model), theirs) > 1e-2
