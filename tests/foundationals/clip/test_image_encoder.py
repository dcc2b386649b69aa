"""The image encoder against transformers' `CLIPVisionModelWithProjection`, at random, non-trivial weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_specimens import randomize, relative_error
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from refiners.foundationals.clip.image_encoder import (
    CLIP_IMAGE_G,
    CLIP_IMAGE_H,
    CLIP_IMAGE_L,
    CLIPImageEncoder,
    CLIPImageSpec,
)
from refiners.foundationals.clip.image_encoder_names import IMAGE_ENCODER, load_clip_image_encoder
from refiners.weights import write_safetensors

SMALL = CLIPImageSpec(
    image_size=28,
    patch_size=7,
    embedding_dim=32,
    num_layers=3,
    num_attention_heads=4,
    feedforward_dim=80,
    projection_dim=24,
)
SPECS = {"exact GELU": SMALL, "quick GELU": replace(SMALL, use_quick_gelu=True, num_layers=2)}


def reference(spec: CLIPImageSpec) -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=spec.embedding_dim,
        intermediate_size=spec.feedforward_dim,
        projection_dim=spec.projection_dim,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_attention_heads,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        hidden_act="quick_gelu" if spec.use_quick_gelu else "gelu",
        layer_norm_eps=spec.layer_norm_eps,
    )
    return CLIPVisionModelWithProjection(config).eval()


def build_pair(spec: CLIPImageSpec) -> tuple[CLIPImageEncoder, CLIPVisionModelWithProjection]:
    ours, theirs = CLIPImageEncoder(spec), reference(spec)
    randomize(theirs)
    ours.load_state_dict({IMAGE_ENCODER.to_ours(name): tensor for name, tensor in theirs.state_dict().items()})
    return ours, theirs


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth colours with some noise on them."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x / width, y / height, (x + y) / (width + height)], axis=-1) * 200
    noise = np.random.default_rng(width).uniform(0, 55, smooth.shape)
    return Image.fromarray((smooth + noise).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_vector_and_the_grid_equal_those_of_transformers(spec: CLIPImageSpec) -> None:
    ours, theirs = build_pair(spec)
    pixels = torch.randn(3, 3, spec.image_size, spec.image_size)
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True)
        assert relative_error(ours(pixels), expected.image_embeds) < 1e-5
        assert relative_error(ours.grid_features()(pixels), expected.hidden_states[-2]) < 1e-5


def test_gradients_reach_the_pixels_as_with_transformers() -> None:
    ours, theirs = build_pair(SMALL)
    pixels = torch.randn(2, 3, 28, 28, requires_grad=True)
    (ours_gradient,) = torch.autograd.grad(ours(pixels).square().sum(), pixels)
    (expected,) = torch.autograd.grad(theirs(pixels).image_embeds.square().sum(), pixels)
    assert relative_error(ours_gradient, expected) < 1e-4


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize(("width", "height"), [(224, 224), (300, 517), (640, 231), (61, 90)])
def test_pictures_become_the_same_pixels_as_with_transformers(width: int, height: int, mode: str) -> None:
    image = picture(width, height, mode)
    expected = CLIPImageProcessorPil()(image, return_tensors="pt").pixel_values
    ours = CLIPImageEncoder(CLIP_IMAGE_H, device="meta").layer("Pixels")(image)
    assert ours.shape == expected.shape and (ours - expected).abs().max() < 1e-5


def test_pictures_and_their_pixels_give_the_same_vectors() -> None:
    encoder, _ = build_pair(SMALL)
    images = [picture(40, 30), picture(28, 99)]
    with torch.no_grad():
        vectors = encoder(images)
        assert vectors.shape == (2, 24)
        assert torch.allclose(vectors[1:], encoder(images[1]), atol=1e-6)
        assert torch.equal(vectors, encoder(encoder.layer("Pixels")(images)))


@pytest.mark.slow
@pytest.mark.parametrize("spec", [CLIP_IMAGE_H, CLIP_IMAGE_L, CLIP_IMAGE_G], ids=["H", "L", "bigG"])
def test_every_key_of_the_full_size_has_its_place(spec: CLIPImageSpec) -> None:
    with torch.device("meta"):
        theirs = {name: tensor.shape for name, tensor in reference(spec).state_dict().items()}
    ours = CLIPImageEncoder(spec, device="meta").state_dict()
    assert {IMAGE_ENCODER.to_theirs(name): tensor.shape for name, tensor in ours.items()} == theirs
    assert all(IMAGE_ENCODER.to_ours(str(IMAGE_ENCODER.to_theirs(name))) == name for name in ours)


def test_a_file_of_a_whole_clip_loads_and_one_of_something_else_says_why_not(tmp_path: Path) -> None:
    ours, theirs = build_pair(SMALL)
    tensors = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    others = {
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "text_model.final_layer_norm.bias": torch.ones(3),
        "logit_scale": torch.ones(()),
    }
    write_safetensors(tmp_path / "clip.safetensors", tensors | others)
    loaded = load_clip_image_encoder(tmp_path / "clip.safetensors", SMALL)
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(loaded(pixels), ours(pixels))
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert load_clip_image_encoder(tmp_path, SMALL, dtype=torch.float16).dtype == torch.float16
    with pytest.raises(ValueError, match="no CLIP image encoder of size H, L or bigG"):
        load_clip_image_encoder(tmp_path / "clip.safetensors")
    tensors.pop("visual_projection.weight")
    write_safetensors(tmp_path / "cut.safetensors", tensors)
    with pytest.raises(ValueError, match=r"1 are missing \(first: 'visual_projection.weight'\)"):
        load_clip_image_encoder(tmp_path / "cut.safetensors", SMALL)


def test_what_is_no_picture_is_refused() -> None:
    encoder = CLIPImageEncoder(SMALL)
    with pytest.raises(ValueError, match=r"takes pixels of \(B, 3, 28, 28\), but these are \(1, 3, 30, 28\)"):
        encoder(torch.zeros(1, 3, 30, 28))
    with pytest.raises(TypeError, match=r"the picture is the str 'cat\.png': give a PIL image"):
        encoder(["cat.png"])
    with pytest.raises(ValueError, match="the picture should be a picture, or several, but there are none"):
        encoder([])
    with pytest.raises(ValueError, match="divide into patches"):
        CLIPImageSpec(image_size=225)
