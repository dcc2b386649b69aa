"""FreeU against diffusers."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.torch_utils import fourier_filter
from diffusion_specimens import small_folder
from steering_specimens import TIMESTEP, our_latents, pair, predict, relative_error, their_latents, their_pipeline

from refiners.foundationals.latent_diffusion import StableDiffusion_1, UNetSpec
from refiners.foundationals.latent_diffusion.steering import FreeUAdapter
from refiners.foundationals.latent_diffusion.steering.free_u import ScaledLows

SPECS = {
    "two levels": UNetSpec((32, 64), (1, 0), (2, 4), text_dim=16, norm_groups=8),
    "as SDXL, odd widths": UNetSpec(
        (24, 33, 45), (0, 1, 2), (2, 3, 5), text_dim=16, norm_groups=3, has_linear_projection=True
    ),
    "four levels": UNetSpec((16, 24, 32, 32), (1, 1, 1, 0), (2, 2, 4, 4), 1, text_dim=16, norm_groups=8),
}


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("size", [(8, 8), (9, 14)])
def test_the_prediction_equals_diffusers(spec: UNetSpec, size: tuple[int, int]) -> None:
    ours, theirs = pair(spec)
    x, text = torch.randn(2, 4, *size), torch.randn(2, 7, spec.text_dim)
    without = predict(ours, x, text)
    FreeUAdapter(ours, backbone_scales=(1.3, 1.6), skip_scales=(0.7, 0.2)).inject()
    theirs.enable_freeu(b1=1.3, b2=1.6, s1=0.7, s2=0.2)
    expected = theirs(x, TIMESTEP, text).sample
    assert relative_error(predict(ours, x, text), expected) < 1e-5 < relative_error(without, expected)


def test_a_whole_trajectory_equals_diffusers(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "sd")
    model, pipeline = StableDiffusion_1.from_pretrained(folder), their_pipeline(StableDiffusionPipeline, folder)
    free_u = FreeUAdapter(model.unet).inject()
    pipeline.enable_freeu(b1=1.2, b2=1.4, s1=0.9, s2=0.2)
    assert relative_error(our_latents(model, 5.0), their_latents(pipeline, 5.0)) < 1e-4
    free_u.eject()
    pipeline.disable_freeu()
    assert relative_error(our_latents(model, 5.0), their_latents(pipeline, 5.0)) < 1e-4


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 3), (5, 7), (8, 8), (9, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_filter_equals_diffusers(size: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, *size).to(dtype)
    ours, theirs = ScaledLows(0.3)(x), fourier_filter(x, threshold=1, scale=0.3)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@torch.no_grad()
def test_scales_can_be_changed_and_differ_between_pictures() -> None:
    ours, _ = pair(SPECS["two levels"])
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 16)
    free_u = FreeUAdapter(ours, (1.3, 1.6), (0.7, 0.2)).inject()
    expected = predict(ours, x, text)
    free_u.backbone_scales, free_u.skip_scales = (1.0, 1.0), (1.0, 1.0)
    without = predict(ours, x, text)
    assert relative_error(without, expected) > 1e-3
    free_u.backbone_scales, free_u.skip_scales = ((1.0, 1.3), (1.0, 1.6)), ((1.0, 0.7), (1.0, 0.2))
    mixed = predict(ours, x, text)
    assert relative_error(mixed[:1], without[:1]) < 1e-6 and relative_error(mixed[1:], expected[1:]) < 1e-6
    assert free_u.skip_scales == ((1.0, 0.7), (1.0, 0.2))


def test_scales_that_do_not_fit_are_refused() -> None:
    ours, _ = pair(SPECS["two levels"])
    with pytest.raises(ValueError, match="at most 2 for this UNet, but got 3 and 3"):
        FreeUAdapter(ours, (1, 1, 1), (1, 1, 1))
    with pytest.raises(ValueError, match="but got 2 and 1"):
        FreeUAdapter(ours, (1, 1), (1,))
    with pytest.raises(ValueError, match="1 scales, but this FreeU is on 2 levels"):
        FreeUAdapter(ours).skip_scales = (0.5,)
