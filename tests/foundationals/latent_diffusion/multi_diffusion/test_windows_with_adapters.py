"""What leads a model and covers the picture is cut out along with the windows, and compiled UNets stay compiled."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch._dynamo.testing import CompileCounter

sys.path.insert(0, str(Path(__file__).parent.parent))
from diffusion_specimens import randomize, small_model

import refiners.fluxion.layers as fl
from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.latent_diffusion import StableDiffusion_1, StableDiffusion_1_Inpainting
from refiners.foundationals.latent_diffusion.control import (
    ConditionEncoder,
    ControlNet,
    ControlNetAdapter,
    ControlNetSpec,
    T2IAdapter,
    T2ISpec,
)
from refiners.foundationals.latent_diffusion.image_prompt import IPAdapter
from refiners.foundationals.latent_diffusion.multi_diffusion import MultiDiffusion, Region, RegionalPrompts
from refiners.foundationals.latent_diffusion.steering import StyleAlignedAdapter

HEIGHT, WIDTH, SIDE = 8, 20, 8  # of the latents and of windows


def predict(model: StableDiffusion_1, x: Tensor) -> Tensor:
    return model.predict_noise(x, model.steps[0], model.compute_text_embedding("a cat", "bad"), 5.0)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def predict_in_windows(model: StableDiffusion_1, x: Tensor, count: int) -> Tensor:
    windows = MultiDiffusion(model, window_size=64, stride=32, window_batch_size=count).inject()
    try:
        return predict(model, x)
    finally:
        windows.eject()


def blend(parts: list[Tensor]) -> Tensor:
    """Of windows at 0, 4, 8 and 12."""
    total, counts = torch.zeros(2, 4, HEIGHT, WIDTH), torch.zeros(WIDTH)
    for index, part in enumerate(parts):
        total[..., 4 * index : 4 * index + SIDE] += part
        counts[4 * index : 4 * index + SIDE] += 1
    return total / counts


def crop(x: Tensor, index: int) -> Tensor:
    """What a window covers of latents, or of something finer."""
    unit = x.shape[-1] // WIDTH
    return x[..., 4 * index * unit : (4 * index + SIDE) * unit]


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_the_picture_of_a_control_net_is_cut_out(count: int) -> None:
    model, x = small_model(), torch.randn(2, 4, HEIGHT, WIDTH)
    adapters: list[ControlNetAdapter] = []
    for _ in range(2):
        control_net = ControlNet(ControlNetSpec(unet=model.unet.spec))
        randomize(control_net)
        adapters.append(ControlNetAdapter(model, control_net, scale=0.5).inject())
        adapters[-1].set_controlnet_condition(torch.rand(1, 3, HEIGHT * 8, WIDTH * 8))
    whole = predict_in_windows(model, x, count)
    kept = [(adapter.condition, adapter.features) for adapter in adapters]
    parts: list[Tensor] = []
    for index in range(4):
        for adapter, tensors in zip(adapters, kept, strict=True):
            adapter._buffers["condition"], adapter._buffers["features"] = (crop(each, index) for each in tensors)
        parts.append(predict(model, crop(x, index)))
    assert relative_error(whole, blend(parts)) < 1e-5


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_the_masks_of_image_prompts_are_cut_out(count: int) -> None:
    model, x = small_model(), torch.randn(2, 4, HEIGHT, WIDTH)
    adapter = IPAdapter(model).inject()
    randomize(adapter)
    adapter.set_clip_image_embedding(torch.randn(2, 8, model.unet.spec.text_dim))
    mask = Image.new("L", (WIDTH * 8, HEIGHT * 8))
    ImageDraw.Draw(mask).ellipse((30, 5, 120, 60), fill=255)
    masks = [mask, mask.point(lambda value: 255 - value)]
    adapter.set_masks(masks)
    whole = predict_in_windows(model, x, count)
    parts: list[Tensor] = []
    for index in range(4):
        adapter.set_masks([mask.crop((index * 32, 0, index * 32 + 64, 64)) for mask in masks])
        parts.append(predict(model, crop(x, index)))
    assert relative_error(whole, blend(parts)) < 1e-5


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_what_an_inpainting_model_keeps_is_cut_out(count: int) -> None:
    model: Any = small_model(StableDiffusion_1_Inpainting)
    x, conditions = torch.randn(2, 4, HEIGHT, WIDTH), torch.randn(1, 5, HEIGHT, WIDTH)
    model._conditions = conditions
    whole = predict_in_windows(model, x, count)
    parts: list[Tensor] = []
    for index in range(4):
        model._conditions = crop(conditions, index)
        parts.append(predict(model, crop(x, index)))
    assert relative_error(whole, blend(parts)) < 1e-5


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_style_aligned_has_each_window_look_at_its_own_first_picture(count: int) -> None:
    model, x = small_model(), torch.randn(2, 4, HEIGHT, WIDTH)
    apart = predict_in_windows(model, x, count)
    aligned = StyleAlignedAdapter(model).inject()
    parts = [predict(model, crop(x, index)) for index in range(4)]
    whole = predict_in_windows(model, x, count)
    assert relative_error(whole, blend(parts)) < 1e-5
    assert relative_error(whole[:1], apart[:1]) < 1e-5 and relative_error(whole[1:], apart[1:]) > 1e-3
    aligned.eject()


@pytest.mark.slow
@torch.no_grad()
def test_one_compiled_graph_serves_all_windows_and_regions() -> None:
    model, x = small_model(), torch.randn(2, 4, HEIGHT, WIDTH)
    RegionalPrompts(model, [Region("a dog", (0, 0, 0.5, 1))], size=(HEIGHT * 8, WIDTH * 8)).inject()
    expected = predict_in_windows(model, x, 1)
    counter = CompileCounter()
    model.unet.compile(fullgraph=True, backend=counter)
    assert relative_error(predict_in_windows(model, x, 1), expected) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_all_together_go_on_and_off_in_any_order_and_leave_every_bit_as_it_was(seed: int) -> None:
    model, x = small_model(), torch.randn(2, 4, HEIGHT, WIDTH)
    before, keys = predict(model, x), list(model.unet.state_dict())
    edits, chance = everything(model), random.Random(seed)
    found: list[Tensor] = []
    for _ in range(2):
        for edit in chance.sample(edits, len(edits)):
            edit.inject()
        found.append(predict(model, x))
        assert set(keys) <= set(model.unet.state_dict())
        for edit in chance.sample(edits, len(edits)):
            edit.eject()
        assert list(model.unet.state_dict()) == keys
        assert torch.equal(predict(model, x), before)
    assert relative_error(found[0], found[1]) < 1e-5 < 0.01 < relative_error(found[0], before)


def everything(model: StableDiffusion_1) -> list[Any]:
    control_net = ControlNet(ControlNetSpec(unet=model.unet.spec))
    encoder = ConditionEncoder(T2ISpec.for_unet(model.unet.spec))
    ip_adapter = IPAdapter(model)
    for each in (control_net, encoder, ip_adapter):
        randomize(each)
    ip_adapter.set_clip_image_embedding(torch.randn(2, 4, model.unet.spec.text_dim))
    control, picture = ControlNetAdapter(model, control_net, scale=0.3), torch.rand(1, 3, HEIGHT * 8, WIDTH * 8)
    control.set_controlnet_condition(picture)
    t2i_adapter = T2IAdapter(model, condition_encoder=encoder, scale=0.3)
    t2i_adapter.set_condition_features(t2i_adapter.compute_condition_features(picture))
    layer = model.unet.ensure_find(fl.SelfAttention).ensure_find(fl.Linear)
    lora = LoraAdapter(layer, rank=2)
    torch.nn.init.normal_(lora.loras["lora"].up.weight)
    regions = RegionalPrompts(model, [Region("a dog", (0, 0, 0.5, 1))], size=(HEIGHT * 8, WIDTH * 8))
    windows = MultiDiffusion(model, window_size=64, stride=32, window_batch_size=2)
    return [control, t2i_adapter, ip_adapter, lora, regions, windows]
