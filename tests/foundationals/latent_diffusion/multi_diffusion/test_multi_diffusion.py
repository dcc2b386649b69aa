"""MultiDiffusion against diffusers' panorama pipeline, and against windows that are run one by one."""

import sys
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPanoramaPipeline
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent.parent))
from diffusion_specimens import SMALL, generators, small_folder, small_model

import refiners.fluxion.layers as fl
from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.latent_diffusion import StableDiffusion_1, StableDiffusion_XL
from refiners.foundationals.latent_diffusion.control import T2IAdapter
from refiners.foundationals.latent_diffusion.control.t2i_adapter_encoder import feature_places
from refiners.foundationals.latent_diffusion.multi_diffusion import MultiDiffusion
from refiners.foundationals.latent_diffusion.multi_diffusion.windows import Windows
from refiners.solvers import DDIM


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("is_circular", [False, True])
@torch.no_grad()
def test_a_panorama_equals_that_of_diffusers(is_circular: bool, tmp_path: Path) -> None:
    folder = small_folder(tmp_path)
    pipeline: Any = StableDiffusionPanoramaPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.get_views = partial(pipeline.get_views, window_size=8, stride=2)
    height, width = 64 if is_circular else 80, 128  # of several rows, diffusers' circular windows fail
    noise = torch.randn(1, 4, height // 8, width // 8)
    expected = pipeline(
        "a cat", height, width, num_inference_steps=3, guidance_scale=5.0, negative_prompt="bad", latents=noise,
        circular_padding=is_circular, output_type="latent",
    ).images  # fmt: skip
    ours = StableDiffusion_1.from_pretrained(folder)
    ours.solver = DDIM(3, params=ours.spec.solver_params)
    MultiDiffusion(ours, window_size=64, stride=16, is_circular=is_circular, window_batch_size=3).inject()
    x, text = noise, ours.compute_text_embedding("a cat", "bad")
    for step in ours.steps:
        x = ours(x, step, clip_text_embedding=text, condition_scale=5.0)
    assert relative_error(x, expected) < 1e-4


def test_windows_cover_all_and_their_blend_gives_back_what_they_cut_out() -> None:
    for size in [(8, 8), (5, 8), (8, 21), (13, 9), (30, 3)]:
        for side, stride in [(8, 8), (8, 3), (6, 5), (40, 1)]:
            for is_circular in (False, True):
                windows = Windows(size, side, stride, is_circular)
                x = torch.randn(2, 3, *size)
                parts = [(window, windows.crop(x, window)) for window in windows]
                assert all(max(part.shape[2:]) <= side for _, part in parts)
                for is_faded in (False, True):
                    assert torch.allclose(windows.blend(parts, is_faded), x, atol=1e-6)


def test_coarser_and_finer_values_are_cut_out_along() -> None:
    windows = Windows((16, 32), side=8, stride=4, is_circular=True)
    rows, columns = torch.arange(16.0)[:, None], torch.arange(32.0)
    latents = (rows * 100 + columns)[None, None]
    for window in windows:
        expected = windows.crop(latents, window)
        for factor in (2, 4):
            coarse = windows.crop(latents[..., ::factor, ::factor], window)
            assert torch.equal(coarse, expected[..., ::factor, ::factor])
        fine = windows.crop(latents.repeat_interleave(8, 2).repeat_interleave(8, 3), window)
        assert torch.equal(fine, expected.repeat_interleave(8, 2).repeat_interleave(8, 3))


@pytest.mark.parametrize("size", [(10, 13), (17, 8), (11, 30)])
@pytest.mark.parametrize("side", [6, 8])
def test_what_is_cut_out_has_the_size_that_the_unet_has_there(size: tuple[int, int], side: int) -> None:
    for is_circular in (False, True):
        windows = Windows(size, side, stride=3, is_circular=is_circular)
        coarse = finer = torch.zeros(1, 1, *size)
        finer = finer.repeat_interleave(8, 2).repeat_interleave(8, 3)
        for halvings in range(4):
            for window in windows:
                expected = [ceil(length / 2**halvings) for length in (window.height, window.width)]
                assert list(windows.crop(coarse, window).shape[2:]) == expected
                assert list(windows.crop(finer, window).shape[2:]) == [8 * window.height, 8 * window.width]
            coarse = functional.avg_pool2d(coarse, 2, ceil_mode=True)


def led_model() -> StableDiffusion_1:
    """With a LoRA and a T2I-Adapter, both with a scale for each of two pictures."""
    model = small_model()
    adapter = T2IAdapter(model, scale=[1.0, 0.3]).inject()
    places = feature_places(model.unet.spec)
    adapter.set_condition_features(
        [torch.randn(2, place.width, 12 // place.scale, 20 // place.scale) for place in places]
    )
    lora = LoraAdapter(model.unet.ensure_find(fl.Attention).ensure_find(fl.Linear), rank=2).inject()
    torch.nn.init.normal_(lora.loras["lora"].up.weight)
    lora.loras["lora"].scale = [1.0, 0.2]
    return model


def predict(model: StableDiffusion_1, x: Tensor, condition_scale: float) -> Tensor:
    text = model.compute_text_embedding(["a cat", "two dogs"], "bad")
    return model.predict_noise(x, model.steps[0], text, condition_scale)


@pytest.mark.parametrize("condition_scale", [1.0, 5.0])
@torch.no_grad()
def test_how_many_windows_run_at_once_makes_no_difference_with_adapters_either(condition_scale: float) -> None:
    model, x = led_model(), torch.randn(2, 4, 12, 20, generator=generators(1)[0])
    found: list[Tensor] = []
    for count in (1, 2, 5, 100):
        panorama = MultiDiffusion(model, window_size=64, stride=32, window_batch_size=count).inject()
        found.append(predict(model, x, condition_scale))
        panorama.eject()
    assert all(relative_error(other, found[0]) < 1e-5 for other in found[1:])
    assert relative_error(found[0], predict(model, x, condition_scale)) > 1e-3


@torch.no_grad()
def test_each_window_is_predicted_as_by_the_model_with_what_leads_it_cut_out() -> None:
    model, x = led_model(), torch.randn(2, 4, 12, 20)
    adapter = model.unet.ensure_find(T2IAdapter)
    panorama = MultiDiffusion(model, window_size=64, stride=64).inject()  # side by side but for the last ones
    whole = predict(model, x, 5.0)
    panorama.eject()
    features = [adapter._buffers[name] for name in ("features_0", "features_1")]
    adapter.set_condition_features([features[0][..., :8, 8:16], features[1][..., :4, 4:8]])
    corner = predict(model, x[..., :8, 8:16], 5.0)
    assert relative_error(whole[..., :4, 8:12], corner[..., :4, :4]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_in_half_precision_the_mean_of_many_windows_is_as_exact_as_one(dtype: torch.dtype) -> None:
    windows, x = Windows((8, 40), side=8, stride=1), torch.randn(1, 4, 8, 40).to(dtype)
    blended = windows.blend([(window, windows.crop(x, window)) for window in windows], is_faded=True)
    assert torch.equal(blended, x)


@torch.no_grad()
def test_it_works_on_stable_diffusion_xl() -> None:
    model = small_model(StableDiffusion_XL)
    x = torch.randn(1, 4, 8, 12)
    conditions = model.compute_conditions("a cat", "bad", (64, 64))
    found: list[Tensor] = []
    for count in (1, 2):
        windows = MultiDiffusion(model, window_size=64, stride=32, window_batch_size=count).inject()
        found.append(model.predict_noise(x, model.steps[0], **conditions))
        windows.eject()
    parts = [model.predict_noise(x[..., start : start + 8], model.steps[0], **conditions) for start in (0, 4)]
    expected = torch.cat([parts[0][..., :4], (parts[0][..., 4:] + parts[1][..., :4]) / 2, parts[1][..., 4:]], dim=-1)
    assert all(relative_error(each, expected) < 1e-5 for each in found)


@torch.no_grad()
def test_pictures_no_larger_than_a_window_run_whole_and_ejecting_restores_every_bit() -> None:
    model, x = small_model(), torch.randn(2, 4, 8, 8)
    before = predict(model, x, 5.0)
    panorama = MultiDiffusion(model, is_faded=True).inject()
    assert panorama.window_size == SMALL.default_size
    assert torch.allclose(predict(model, x, 5.0), before, atol=1e-6)
    panorama.eject()
    assert torch.equal(predict(model, x, 5.0), before)


def test_what_does_not_cover_the_picture_is_refused() -> None:
    model = small_model()
    with pytest.raises(ValueError, match=r"windows of 60 pixels, each 24 after .* multiples"):
        MultiDiffusion(model, window_size=60)
    with pytest.raises(ValueError, match="each 72 after the one before, do not cover"):
        MultiDiffusion(model, window_size=64, stride=72)
    with pytest.raises(ValueError, match="window_batch_size is 0"):
        MultiDiffusion(model, window_batch_size=0)
    first = MultiDiffusion(model).inject()
    with pytest.raises(RuntimeError, match="run by a MultiDiffusion already"):
        MultiDiffusion(model).inject()
    first.eject()
    with pytest.raises(RuntimeError, match="not injected"):
        first.eject()
