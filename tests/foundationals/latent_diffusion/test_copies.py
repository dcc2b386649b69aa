"""Structural copies of a model are led by what leads the model, each on its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_specimens import small_model
from test_pipeline import mask, picture
from torch import Tensor, nn

from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.latent_diffusion import StableDiffusion_1_Inpainting, StableDiffusion_XL
from refiners.foundationals.latent_diffusion.lora import save_lora
from refiners.foundationals.latent_diffusion.multi_diffusion import MultiDiffusion
from refiners.foundationals.latent_diffusion.steering import (
    PerturbedAttentionGuidance,
    ReferenceOnlyControlAdapter,
    SelfAttentionGuidance,
)

Lead = Callable[[Any, Path], Callable[[Any], None]]  # leads a model, and returns what takes that off it or off a copy


def latents(model: Any, steps: int = 3) -> Tensor:
    found: list[Tensor] = []
    model.generate(
        ["a cat", "a dog"],
        "ugly",
        seed=[1, 2],
        num_inference_steps=steps,
        size=(64, 96),
        on_step=lambda report: found.append(report.latents),
        show_progress=False,
    )
    return found[-1]


def perturbed(model: Any, folder: Path) -> Callable[[Any], None]:
    PerturbedAttentionGuidance(model, layers="down", adaptive_scale=0.001).inject()
    return lambda led: led.guidances[0].eject()


def blurred(model: Any, folder: Path) -> Callable[[Any], None]:
    SelfAttentionGuidance(model).inject()
    return lambda led: led.guidances[0].eject()


def windows(model: Any, folder: Path) -> Callable[[Any], None]:
    MultiDiffusion(model, stride=32).inject()
    return lambda led: led.unet_runner.eject()


def function(model: Any, folder: Path) -> Callable[[Any], None]:
    model.guidances.append(lambda prediction: 0.5 * prediction.positive)
    return lambda led: led.guidances.clear()


def scheduled(model: Any, folder: Path) -> Callable[[Any], None]:
    source = model.structural_copy()
    for tree in (source.unet, source.clip_text_encoder):
        for linear, parent in list(tree.walk(nn.Linear)):
            nn.init.normal_(LoraAdapter(linear, rank=2).inject(parent).loras["lora"].up.weight, std=0.3)
    save_lora(folder / "style.safetensors", source)
    model.loras.add(folder / "style.safetensors", scale=lambda index, count: 1.0 - index / count)
    return lambda led: led.loras.clear()


LEADS: dict[str, Lead] = {
    "perturbed attention": perturbed,
    "self-attention guidance": blurred,
    "MultiDiffusion": windows,
    "a function": function,
    "a schedule of a LoRA": scheduled,
}


@pytest.mark.parametrize("name", LEADS)
def test_a_copy_is_led_as_the_model_is_and_each_is_freed_by_itself(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = small_model(StableDiffusion_XL)
    before = latents(model)
    free = LEADS[name](model, tmp_path)
    led, copy = latents(model), model.structural_copy()
    assert not torch.equal(led, before)
    latents(model, steps=5)
    assert torch.equal(latents(copy), led)
    free(model)
    assert torch.equal(latents(model), before) and torch.equal(latents(copy), led)
    assert torch.equal(latents(copy.structural_copy()), led)
    free(copy)
    assert torch.equal(latents(copy), before)


def test_a_guidance_has_another_scale_on_a_copy() -> None:
    model: Any = small_model()
    guidance = PerturbedAttentionGuidance(model, scale=2.0, layers="down").inject()
    copy = model.structural_copy()
    copy.guidances[0].scale = 5.0
    assert guidance.scale == 2.0 and copy.guidances[0].scale == 5.0
    assert copy.guidances[0].model is copy


def test_the_reference_of_a_copy_has_the_noise_of_the_copys_steps() -> None:
    model: Any = small_model()
    adapter = ReferenceOnlyControlAdapter(model).inject()
    adapter.set_reference(model, torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1)))
    expected = latents(model, steps=7)
    copy = model.structural_copy()
    model.set_num_inference_steps(2)
    assert torch.equal(latents(copy, steps=7), expected)


def test_a_copy_of_an_inpainting_model_fills_in_the_same() -> None:
    model: Any = small_model(StableDiffusion_1_Inpainting)
    with torch.no_grad():
        model.set_inpainting_conditions(picture(), mask(), latents_size=(8, 12))
        text, x = torch.randn(2, 77, 32), torch.randn(1, 4, 8, 12)
        assert torch.equal(model.structural_copy().predict_noise(x, 3, text), model.predict_noise(x, 3, text))
