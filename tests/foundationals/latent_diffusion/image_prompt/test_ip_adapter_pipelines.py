"""Whole pictures with image prompts, against diffusers' pipelines on the same files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusion_specimens import generators, psnr, randomize, small_folder
from ip_adapter_specimens import give_to_theirs
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import refiners.fluxion.layers as fl
from refiners.foundationals.clip.image_encoder import CLIPImageEncoder, CLIPImageSpec
from refiners.foundationals.clip.image_encoder_names import IMAGE_ENCODER
from refiners.foundationals.latent_diffusion import StableDiffusion_1, StableDiffusion_XL
from refiners.foundationals.latent_diffusion.image_prompt import (
    ImageProjection,
    IPAdapter,
    PerceiverResampler,
    ResamplerSpec,
)

# diffusers' schedulers hand tensors to numpy in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

IMAGE = CLIPImageSpec(
    28, 7, embedding_dim=32, num_layers=3, num_attention_heads=4, feedforward_dim=64, projection_dim=20
)
PIPELINES = {StableDiffusion_1: StableDiffusionPipeline, StableDiffusion_XL: StableDiffusionXLPipeline}


def image_encoders() -> tuple[CLIPImageEncoder, CLIPVisionModelWithProjection]:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        hidden_act="gelu",
    )
    torch.manual_seed(4)
    ours, theirs = CLIPImageEncoder(IMAGE), CLIPVisionModelWithProjection(config).eval()
    randomize(theirs)
    ours.load_state_dict({IMAGE_ENCODER.to_ours(name): tensor for name, tensor in theirs.state_dict().items()})
    return ours, theirs


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 45, 3), dtype=np.uint8))


def adapted(model: Any, kind: str) -> IPAdapter:
    encoder, _ = image_encoders()
    text_dim = model.unet.spec.text_dim
    resampler = ResamplerSpec(32, text_dim, inner_dim=32, num_tokens=5, num_heads=1, feedforward_dim=128)
    projection = ImageProjection(20, text_dim) if kind == "plain" else PerceiverResampler(resampler)
    adapter = IPAdapter(model, encoder, projection, scale=0.8)
    randomize(projection)
    for attention in adapter.attentions:
        for linear in attention.image_attention.layers(fl.Linear):
            torch.nn.init.normal_(linear.weight, std=0.3)
    return adapter.inject()


@pytest.mark.parametrize("kind", ["plain", "plus"])
@pytest.mark.parametrize("cls", PIPELINES)
def test_a_picture_as_a_prompt_gives_the_picture_of_diffusers(cls: Any, kind: str, tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "model", cls)
    ours = cls.from_pretrained(folder)
    adapter = adapted(ours, kind)
    options: dict[str, Any] = {"add_watermarker": False} if cls is StableDiffusion_XL else {}
    theirs: Any = PIPELINES[cls].from_pretrained(folder, **options)
    theirs.set_progress_bar_config(disable=True)
    give_to_theirs(theirs.unet, adapter)
    _, image_encoder = image_encoders()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    theirs.register_modules(image_encoder=image_encoder, feature_extractor=processor)
    expected = theirs(
        "a cute cat",
        negative_prompt="blurry",
        ip_adapter_image=picture(),
        num_inference_steps=3,
        guidance_scale=4.0,
        height=64,
        width=72,
        generator=generators(3),
        output_type="np",
    ).images
    with torch.no_grad():
        adapter.set_clip_image_embedding(adapter.compute_clip_image_embedding(picture()))
    settings: dict[str, Any] = {
        "seed": 3,
        "num_inference_steps": 3,
        "condition_scale": 4.0,
        "size": (64, 72),
        "show_progress": False,
    }
    assert psnr(ours.generate("a cute cat", "blurry", **settings), torch.from_numpy(expected)) > 50
    adapter.eject()
    assert psnr(ours.generate("a cute cat", "blurry", **settings), torch.from_numpy(expected)) < 40
