"""Regional prompts: against cross-attention that is computed anew, plainly, for each region."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

import refiners.fluxion.layers as fl

sys.path.insert(0, str(Path(__file__).parent.parent))
from diffusion_specimens import small_model

from refiners.adapters.lora import LoraAdapter
from refiners.fluxion.utils import image_to_tensor
from refiners.foundationals.latent_diffusion import StableDiffusion_1, StableDiffusion_XL
from refiners.foundationals.latent_diffusion.multi_diffusion import MultiDiffusion, Region, RegionalPrompts

LEFT = (0.0, 0.0, 0.5, 1.0)
RIGHT = (0.5, 0.0, 1.0, 1.0)


def circle() -> Image.Image:
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).ellipse((4, 10, 30, 50), fill=255)
    return mask


def predict(model: StableDiffusion_1, x: Tensor, prompt: str = "base", condition_scale: float = 5.0) -> Tensor:
    text = model.compute_text_embedding(prompt, "bad")
    return model.predict_noise(x, model.steps[0], text, condition_scale)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@torch.no_grad()
def test_attention_is_mixed_by_the_share_of_each_region_at_its_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    model, mask = small_model(), circle()
    x = torch.randn(1, 4, 8, 8)
    texts = [model.compute_text_embedding(prompt, "bad" if prompt == "base" else "") for prompt in ("base", "a", "b")]
    inside = image_to_tensor(mask)[0, 0]
    half = torch.cat([torch.zeros(64, 32), torch.ones(64, 32)], dim=1)
    shares = torch.stack([(1 - inside - half).clamp(min=0), inside, half])
    plain = fl.Attention.forward

    def regional(self: fl.Attention, query: Tensor, *others: Any) -> Tensor:
        if isinstance(self, fl.SelfAttention):
            return plain(self, query, *others)
        side = int(query.shape[1] ** 0.5)
        pooled = functional.avg_pool2d(shares[None], 64 // side)[0]
        pooled = pooled / pooled.sum(dim=0)
        results = [plain(self, query, text, text) for text in texts]
        return sum(w.flatten()[:, None] * result for w, result in zip(pooled, results, strict=True))  # type: ignore

    with monkeypatch.context() as patch:
        patch.setattr(fl.Attention, "forward", regional)
        expected = predict(model, x)
    RegionalPrompts(model, [Region("a", mask), Region("b", RIGHT)]).inject()
    assert relative_error(predict(model, x), expected) < 1e-5


@torch.no_grad()
def test_a_region_of_the_whole_picture_is_its_prompt_alone_and_ejecting_restores_every_bit() -> None:
    model, x = small_model(), torch.randn(2, 4, 8, 8)
    before, other, keys = predict(model, x), predict(model, x, "other"), list(model.unet.state_dict())
    regions = RegionalPrompts(model, [Region("other", (0, 0, 1, 1), "bad")]).inject()
    assert relative_error(predict(model, x), other) < 1e-5
    lora = LoraAdapter(model.unet.ensure_find(fl.Linear), rank=2).inject()
    assert set(keys) <= set(model.unet.state_dict())
    regions.eject()
    lora.eject()
    assert torch.equal(predict(model, x), before) and list(model.unet.state_dict()) == keys


@torch.no_grad()
def test_regions_of_one_prompt_are_that_prompt_however_they_overlap() -> None:
    model, x = small_model(), torch.randn(1, 4, 8, 8)
    expected = predict(model, x, "base", condition_scale=1.0)
    RegionalPrompts(model, [Region("base", circle()), Region("base", LEFT), Region("base", (0.2, 0.1, 1, 1))]).inject()
    assert relative_error(predict(model, x, condition_scale=1.0), expected) < 1e-5


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_windows_see_the_regions_that_they_cover(count: int) -> None:
    model, x = small_model(), torch.randn(2, 4, 8, 16)
    windows = MultiDiffusion(model, window_size=64, stride=64, window_batch_size=count).inject()
    left, right = predict(model, x, "left")[..., :8], predict(model, x, "right")[..., 8:]
    RegionalPrompts(model, [Region("left", LEFT, "bad"), Region("right", RIGHT, "bad")], size=(64, 128)).inject()
    assert relative_error(predict(model, x), torch.cat([left, right], dim=-1)) < 1e-5
    windows.eject()


@torch.no_grad()
def test_a_structural_copy_has_regions_of_its_own() -> None:
    model, x = small_model(), torch.randn(1, 4, 8, 8)
    before = predict(model, x)
    regions = RegionalPrompts(model, [Region("a", LEFT)]).inject()
    led, copy = predict(model, x), model.structural_copy()
    regions.eject()
    assert torch.equal(predict(copy, x), led) and torch.equal(predict(model, x), before)
    copy.unet.ensure_find(RegionalPrompts).eject()
    assert torch.equal(predict(copy, x), before)


@torch.no_grad()
def test_it_works_on_stable_diffusion_xl_in_half_precision() -> None:
    model = small_model(StableDiffusion_XL, dtype=torch.bfloat16)
    x = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)
    conditions = model.compute_conditions("base", "bad", (64, 64))
    other = model.compute_conditions("other", "bad", (64, 64))["clip_text_embedding"]
    expected = model.predict_noise(x, model.steps[0], **{**conditions, "clip_text_embedding": other})
    RegionalPrompts(model, [Region("other", LEFT, "bad"), Region("other", RIGHT, "bad")]).inject()
    found = model.predict_noise(x, model.steps[0], **conditions)
    assert found.dtype == torch.bfloat16 and relative_error(found, expected) < 0.02


def test_what_is_no_region_is_refused() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="no regions"):
        RegionalPrompts(model, [])
    with pytest.raises(ValueError, match=r"\(0.5, 0, 0.2, 1\) is no rectangle"):
        RegionalPrompts(model, [Region("a", (0.5, 0, 0.2, 1))])
    regions = RegionalPrompts(model, [Region("a", LEFT)])
    with pytest.raises(RuntimeError, match="not injected"):
        regions.eject()
    regions.inject()
    with pytest.raises(RuntimeError, match="already"):
        RegionalPrompts(model, [Region("a", LEFT)]).inject()
