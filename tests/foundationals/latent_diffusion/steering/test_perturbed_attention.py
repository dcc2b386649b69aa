"""Perturbed-attention guidance against diffusers' pipeline."""

from pathlib import Path

import pytest
import torch
from control_specimens import their_control_net
from diffusers import StableDiffusionControlNetPAGPipeline, StableDiffusionPAGPipeline, StableDiffusionXLPAGPipeline
from diffusion_specimens import randomize, small_folder
from PIL import Image
from steering_specimens import STEPS, our_latents, relative_error, their_latents, their_pipeline

from refiners.foundationals.latent_diffusion import StableDiffusion_1, StableDiffusion_XL
from refiners.foundationals.latent_diffusion.control import ControlNetAdapter
from refiners.foundationals.latent_diffusion.steering import FreeUAdapter, PerturbedAttentionGuidance


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("model") / "sd")


@pytest.mark.parametrize(
    ("condition_scale", "layers", "adaptive_scale"),
    [
        (5.0, "mid", 0.0),
        (1.0, "mid", 0.0),
        (5.0, ["down_blocks.0", "mid"], 0.0),
        (5.0, "up_blocks.1.attentions.(0|2)", 0.0),
        (1.0, "mid", 0.004),
    ],
)
def test_a_whole_trajectory_equals_diffusers(
    folder: Path, condition_scale: float, layers: str | list[str], adaptive_scale: float
) -> None:
    model = StableDiffusion_1.from_pretrained(folder)
    pipeline = their_pipeline(StableDiffusionPAGPipeline, folder, pag_applied_layers=layers)
    theirs = their_latents(pipeline, condition_scale, pag_scale=3.0, pag_adaptive_scale=adaptive_scale)
    without = our_latents(model, condition_scale)
    PerturbedAttentionGuidance(model, scale=3.0, layers=layers, adaptive_scale=adaptive_scale).inject()
    assert relative_error(our_latents(model, condition_scale), theirs) < 1e-4 < relative_error(without, theirs) / 10


def test_a_whole_trajectory_of_xl_equals_diffusers(tmp_path: Path) -> None:
    condition_scale = 5.0
    folder = small_folder(tmp_path / "sdxl", StableDiffusion_XL)
    model = StableDiffusion_XL.from_pretrained(folder)
    pipeline = their_pipeline(StableDiffusionXLPAGPipeline, folder, add_watermarker=False)
    theirs = their_latents(pipeline, condition_scale, pag_scale=3.0)
    without = our_latents(model, condition_scale)
    PerturbedAttentionGuidance(model).inject()
    assert relative_error(our_latents(model, condition_scale), theirs) < 1e-4 < relative_error(without, theirs) / 10


def test_with_a_control_net_and_free_u_a_whole_trajectory_equals_diffusers(folder: Path, tmp_path: Path) -> None:
    model = StableDiffusion_1.from_pretrained(folder)
    control_net, picture = their_control_net(model.spec.unet, (8, 8, 12, 16)), Image.effect_noise((72, 64), 90)
    randomize(control_net)
    control_net.save_pretrained(tmp_path / "control")
    pipeline = their_pipeline(StableDiffusionControlNetPAGPipeline, folder, controlnet=control_net)
    pipeline.enable_freeu(b1=1.2, b2=1.4, s1=0.9, s2=0.2)
    settings = {"image": picture.convert("RGB"), "controlnet_conditioning_scale": 0.5}
    theirs = their_latents(pipeline, 5.0, pag_scale=3.0, **settings)
    FreeUAdapter(model).inject()
    control = ControlNetAdapter(model, tmp_path / "control", scale=0.5)
    control.set_controlnet_condition(picture)
    without_control = our_latents(model, 5.0)
    control.inject()
    without_guidance = our_latents(model, 5.0)
    PerturbedAttentionGuidance(model).inject()
    assert relative_error(our_latents(model, 5.0), theirs) < 1e-4
    assert min(relative_error(each, theirs) for each in (without_control, without_guidance)) > 1e-3


def test_it_acts_in_its_share_of_the_steps_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StableDiffusion_1.from_pretrained(folder)
    runs, run_unet = list[int](), model.run_unet
    monkeypatch.setattr(model, "run_unet", lambda *args: runs.append(args[1]) or run_unet(*args))
    guidance = PerturbedAttentionGuidance(model, start=0.25, end=0.7).inject()
    our_latents(model, 5.0)
    assert runs == [0, 1, 1, 2, 3] and STEPS == 4
    guidance.scale = 0.0
    assert guidance.scale == 0.0
    still = our_latents(model, 5.0)
    guidance.eject()
    assert torch.equal(still, our_latents(model, 5.0))


def test_what_does_not_fit_is_refused_and_changes_nothing(folder: Path) -> None:
    model = StableDiffusion_1.from_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"'middle' matches no self-attention .* it has down_blocks.0.attentions.0.trans"
    ):
        PerturbedAttentionGuidance(model, layers="middle")
    with pytest.raises(ValueError, match=r"0 <= start < end <= 1, but they are 0.7 and 0.3"):
        PerturbedAttentionGuidance(model, start=0.7, end=0.3)
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"guidance is {scale}, but should be a finite number"):
            PerturbedAttentionGuidance(model, scale=scale)
        with pytest.raises(ValueError, match=f"adaptive_scale is {scale}"):
            PerturbedAttentionGuidance(model, adaptive_scale=scale)
    guidance = PerturbedAttentionGuidance(model).inject()
    with pytest.raises(ValueError, match="guidance is nan"):
        guidance.scale = float("nan")
    assert guidance.scale == 3.0
    with pytest.raises(RuntimeError, match="injected already"):
        guidance.inject()
    assert model.guidances == [guidance]
    guidance.eject()
    with pytest.raises(RuntimeError, match="not injected"):
        guidance.eject()
    assert model.guidances == []
