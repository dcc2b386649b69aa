"""IP-Adapters in a UNet against diffusers', at random, non-trivial weights."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.image_processor import IPAdapterMaskProcessor
from ip_adapter_specimens import SD1, UNETS, features, give_to_theirs, ip_adapter, their_prediction
from PIL import Image
from test_unet import inputs, pair, predict, relative_error
from torch import Tensor

from refiners.foundationals.latent_diffusion import UNetSpec
from refiners.foundationals.latent_diffusion.image_prompt import IPAdapter
from refiners.foundationals.latent_diffusion.image_prompt.attention import TokenProjection


def halves(*images: Tensor) -> Tensor:
    """Zeros for no image prompt, then image prompts: (2, pictures, …), as diffusers takes them."""
    image = torch.cat(images)
    return torch.stack([torch.zeros_like(image), image])


def with_prompt(adapter: IPAdapter, image: Tensor) -> IPAdapter:
    adapter.set_clip_image_embedding(adapter.embed_features(image).detach())
    return adapter


@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
@pytest.mark.parametrize("spec", UNETS.values(), ids=UNETS)
def test_prediction_equals_diffusers(spec: UNetSpec, kind: str) -> None:
    ours, theirs = pair(spec)
    adapter = with_prompt(ip_adapter(ours, kind, scale=0.7).inject(), features(kind))
    give_to_theirs(theirs, adapter)
    arguments = inputs(spec)
    with torch.no_grad():
        expected = their_prediction(theirs, arguments, [halves(features(kind))])
        assert relative_error(predict(ours, *arguments), expected) < 1e-5


def test_two_at_once_with_several_pictures_equal_diffusers() -> None:
    ours, theirs = pair(SD1)
    pictures, others = features("plain", pictures=3), features("plus", pictures=2)
    first = with_prompt(ip_adapter(ours, "plain", scale=0.7).inject(), pictures)
    second = with_prompt(ip_adapter(ours, "plus", seed=5, scale=1.3).inject(), others)
    give_to_theirs(theirs, first, second)
    arguments = inputs(SD1)
    with torch.no_grad():
        expected = their_prediction(theirs, arguments, [halves(pictures), halves(others)])
        assert relative_error(predict(ours, *arguments), expected) < 1e-5


@pytest.mark.parametrize("kind", ["plain", "plus"])
def test_masks_with_a_scale_for_each_picture_equal_diffusers(kind: str) -> None:
    ours, theirs = pair(SD1)
    left = np.zeros((128, 192), dtype=np.uint8)
    left[20:, :100] = 255
    masks = [Image.fromarray(left), Image.fromarray(255 - left)]
    pictures = features(kind, pictures=2)
    adapter = with_prompt(ip_adapter(ours, kind).inject(), pictures)
    adapter.set_masks(masks, scales=[0.5, 1.25])
    give_to_theirs(theirs, adapter, scales=[[0.5, 1.25]])
    their_masks = IPAdapterMaskProcessor().preprocess(masks).reshape(1, 2, 128, 192)
    arguments = inputs(SD1, 16, 24)
    with torch.no_grad():
        expected = their_prediction(theirs, arguments, [halves(pictures)], masks=[their_masks])
        assert relative_error(predict(ours, *arguments), expected) < 1e-5
        adapter.set_masks(None)
        assert relative_error(predict(ours, *arguments), expected) > 1e-3


def test_scales_by_block_equal_those_of_diffusers() -> None:
    spec = UNETS["SDXL"]
    ours, theirs = pair(spec)
    adapter = with_prompt(ip_adapter(ours).inject(), features("plain"))
    give_to_theirs(theirs, adapter)
    pipeline: Any = type("OnlyUNet", (), {"unet_name": "unet", "unet": theirs})()
    StableDiffusionPipeline.set_ip_adapter_scale(pipeline, {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": 0.5}})
    adapter.set_scale(
        1.0,
        blocks={
            "down_blocks": 0,
            "down_blocks.2.attentions.1": 1,
            "mid_block": 0,
            "up_blocks": 0,
            "up_blocks.0": 0.5,
        },
    )
    arguments = inputs(spec)
    with torch.no_grad():
        expected = their_prediction(theirs, arguments, [halves(features("plain"))])
        assert relative_error(predict(ours, *arguments), expected) < 1e-5


@pytest.mark.parametrize("kind", ["plain", "plus"])
def test_gradients_equal_diffusers_and_reach_nothing_else(kind: str) -> None:
    ours, theirs = pair(SD1)
    adapter = ip_adapter(ours, kind).inject()
    ours.requires_grad_(False)
    for parameter in adapter.own_parameters():
        parameter.requires_grad_(True)
    give_to_theirs(theirs, adapter)
    arguments = inputs(SD1)
    adapter.set_clip_image_embedding(adapter.embed_features(features(kind)))
    predict(ours, *arguments).square().mean().backward()
    their_prediction(theirs, arguments, [halves(features(kind))]).square().mean().backward()
    processors = [each for each in theirs.attn_processors.values() if hasattr(each, "to_k_ip")]
    for attention, processor in zip(adapter.attentions, processors, strict=True):
        keys, values = (each.Linear.weight for each in attention.image_attention.Parallel.layers(TokenProjection))
        assert relative_error(keys.grad, processor.to_k_ip[0].weight.grad) < 1e-4
        assert relative_error(values.grad, processor.to_v_ip[0].weight.grad) < 1e-4
    (projection,) = theirs.encoder_hid_proj.image_projection_layers
    last = "norm" if kind == "plain" else "norm_out"
    assert relative_error(adapter.image_proj.LayerNorm.weight.grad, getattr(projection, last).weight.grad) < 1e-4
    own = {id(parameter) for parameter in adapter.own_parameters()}
    assert {id(parameter) for parameter in ours.parameters() if parameter.grad is not None} == own
