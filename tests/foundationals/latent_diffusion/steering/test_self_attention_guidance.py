"""Self-attention guidance against diffusers' pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.deprecated.stable_diffusion_sag.pipeline_stable_diffusion_sag import StableDiffusionSAGPipeline
from diffusion_specimens import small_folder
from steering_specimens import our_latents, relative_error, their_latents, their_pipeline
from torch import Tensor

from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.multi_diffusion import MultiDiffusion
from refiners.foundationals.latent_diffusion.steering import PerturbedAttentionGuidance, SelfAttentionGuidance
from refiners.solvers import DDIM, Euler, SolverParams, TimestepSpacing

X, TEXT = torch.randn(1, 4, 8, 8), torch.randn(2, 77, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("model") / "sd")


@pytest.mark.parametrize(("condition_scale", "scale"), [(5.0, 0.75), (1.0, 0.75), (5.0, 2.0)])
def test_a_whole_trajectory_equals_diffusers(folder: Path, condition_scale: float, scale: float) -> None:
    model = StableDiffusion_1.from_pretrained(folder)
    pipeline = their_pipeline(StableDiffusionSAGPipeline, folder)
    theirs = their_latents(pipeline, condition_scale, sag_scale=scale)
    without = our_latents(model, condition_scale)
    SelfAttentionGuidance(model, scale=scale).inject()
    assert relative_error(our_latents(model, condition_scale), theirs) < 1e-4 < relative_error(without, theirs) / 10


def test_another_guidance_before_it_changes_nothing_of_what_it_adds(folder: Path) -> None:
    """Its attention is that of the prediction, not that of a run that another guidance has asked for."""
    model, added = StableDiffusion_1.from_pretrained(folder), {}
    for order in ([PerturbedAttentionGuidance, SelfAttentionGuidance], [SelfAttentionGuidance]):
        edits = [edit(model).inject() for edit in order]
        with torch.no_grad():
            before = model.predict_noise(X, 9, TEXT)
            edits[-1].scale = 0.0
            added[len(order)] = before - model.predict_noise(X, 9, TEXT)
        for edit in edits:
            edit.eject()
    assert relative_error(added[1], added[2]) < 1e-4


def test_windows_that_see_a_part_are_refused(folder: Path) -> None:
    model = StableDiffusion_1.from_pretrained(folder)
    SelfAttentionGuidance(model).inject()
    MultiDiffusion(model, window_size=64).inject()
    with torch.no_grad():
        model.predict_noise(X, 9, TEXT)
        with pytest.raises(ValueError, match="does not go with MultiDiffusion"):
            model.predict_noise(torch.randn(1, 4, 8, 16), 9, TEXT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_size": 8}, "odd"),
        ({"kernel_size": -1}, "odd and positive"),
        ({"sigma": 0.0}, "sigma should be positive"),
    ],
)
def test_a_blur_that_there_is_not_is_refused_at_once(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfAttentionGuidance(StableDiffusion_1.from_pretrained(folder), **settings)


def test_a_blur_that_is_larger_than_the_latents_is_refused(folder: Path) -> None:
    model = StableDiffusion_1.from_pretrained(folder)
    SelfAttentionGuidance(model, kernel_size=99).inject()
    with torch.no_grad(), pytest.raises(ValueError, match="kernel_size 99 is too large for width 8"):
        model.predict_noise(X, 9, TEXT)


@torch.no_grad()
def test_what_it_adds_does_not_depend_on_how_the_solver_scales_latents(folder: Path) -> None:
    model = StableDiffusion_1.from_pretrained(folder)
    guidance, added = SelfAttentionGuidance(model).inject(), list[Tensor]()
    model.guidances[:] = [lambda prediction: added.append(guidance(prediction)) or added[-1]]
    clean, noise = torch.randn(2, 1, 4, 8, 8).unbind()
    params = SolverParams(timesteps_spacing=TimestepSpacing.LEADING)
    for solver in (DDIM(5, params=params), Euler(5, params=params)):
        model.solver = solver
        model.predict_noise(solver.add_noise(clean, noise, 2), 2, TEXT)
    assert relative_error(added[1], added[0]) < 1e-5 < added[0].norm() / 1000
