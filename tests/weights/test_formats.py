"""What a file is, told from names and shapes: those of the peers' models, and of files that are nothing known."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, T2IAdapter, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from refiners.foundationals.clip import CLIPTextEncoderL
from refiners.foundationals.latent_diffusion import LatentDiffusionAutoencoder, UNet
from refiners.weights.files import write_safetensors
from refiners.weights.formats import Content, Family, identify, identify_file

Shapes = dict[str, tuple[int, ...]]


def shapes_of(build: Any, prefix: str = "", **options: Any) -> Shapes:
    with torch.device("meta"):
        model: nn.Module = build(**options)
    return {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def text_model(width: int) -> Any:
    return CLIPTextModel(CLIPTextConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=4))


@pytest.mark.parametrize(("width", "family"), [(768, Family.SD1), (1024, Family.SD2), (2048, Family.SDXL)])
def test_diffusers_unets(width: int, family: Family) -> None:
    found = identify(shapes_of(UNet2DConditionModel, block_out_channels=(32, 64, 64, 64), cross_attention_dim=width))
    assert (found.content, found.form, found.family) == (Content.UNET, "diffusers", family)
    assert str(found) == f"UNet of {family}, with the names of diffusers (it reads text {width} wide)"


@pytest.mark.parametrize(
    ("build", "options", "content", "form"),
    [
        (AutoencoderKL, {}, Content.AUTOENCODER, "diffusers"),
        (ControlNetModel, {"block_out_channels": (32, 64, 64, 64)}, Content.CONTROLNET, "diffusers"),
        (T2IAdapter, {}, Content.T2I_ADAPTER, "diffusers"),
        (text_model, {"width": 768}, Content.TEXT_ENCODER, "transformers"),
        (UNet, {}, Content.UNET, "Refiners"),
        (LatentDiffusionAutoencoder, {}, Content.AUTOENCODER, "Refiners"),
        (CLIPTextEncoderL, {}, Content.TEXT_ENCODER, "Refiners"),
    ],
)
def test_models_of_diffusers_transformers_and_ours(build: Any, options: Any, content: Content, form: str) -> None:
    found = identify(shapes_of(build, **options))
    assert (found.content, found.form) == (content, form)


ATTENTION = "transformer_blocks.0.attn2.to_k"
NAMED: dict[str, tuple[Shapes, Content, str, Family | None]] = {
    "whole SD1": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
            "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
            "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
        },
        Content.CHECKPOINT,
        "the original files",
        Family.SD1,
    ),
    "whole SDXL": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
            "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
            "conditioner.embedders.1.model.ln_final.weight": (1280,),
        },
        Content.CHECKPOINT,
        "the original files",
        Family.SDXL,
    ),
    "FLUX": ({"double_blocks.0.img_attn.qkv.weight": (9, 3)}, Content.TRANSFORMER, "the original files", Family.FLUX),
    "kohya": (
        {f"lora_unet_input_blocks_4_1_{ATTENTION.replace('.', '_')}.lora_down.weight": (4, 2048)},
        Content.LORA,
        "kohya",
        Family.SDXL,
    ),
    "peft": ({f"base_model.model.{ATTENTION}.lora_A.weight": (4, 768)}, Content.LORA, "peft", Family.SD1),
    "ComfyUI": ({f"diffusion_model.{ATTENTION}.lora_down.weight": (4, 768)}, Content.LORA, "ComfyUI", Family.SD1),
    "OneTrainer": ({f"lora_unet.{ATTENTION}.lora_down.weight": (4, 1024)}, Content.LORA, "OneTrainer", Family.SD2),
    "diffusers": ({f"unet.{ATTENTION}.lora_A.weight": (4, 768)}, Content.LORA, "diffusers", Family.SD1),
    "processors": (
        {"a.attn2.processor.to_k_lora.down.weight": (4, 768)},
        Content.LORA,
        "diffusers' attention processors",
        Family.SD1,
    ),
    "numbered": ({"unet.000": (4, 320), "unet.001": (320, 4)}, Content.LORA, "the first Refiners", None),
    "OFT": ({"oft_unet_middle_block_1_proj_in.oft_blocks": (4, 8, 8)}, Content.LORA, "kohya", None),
    "LoHa": ({"lora_te2_text_model_a.hada_w1_a": (4, 8)}, Content.LORA, "kohya", Family.SDXL),
    "A1111 embedding": ({"emb_params": (4, 768)}, Content.TEXTUAL_INVERSION, "A1111", Family.SD1),
    "diffusers' embedding": ({"<cat-toy>": (1024,)}, Content.TEXTUAL_INVERSION, "diffusers", Family.SD2),
    "SDXL embedding": ({"clip_l": (2, 768), "clip_g": (2, 1280)}, Content.TEXTUAL_INVERSION, "diffusers", Family.SDXL),
    "IP-Adapter": (
        {"image_proj.proj.weight": (8, 8), "ip_adapter.1.to_k_ip.weight": (8, 8)},
        Content.IP_ADAPTER,
        "its authors",
        None,
    ),
    "old ControlNet": (
        {"control_model.input_hint_block.0.weight": (1,), "control_model.zero_convs.0.0.weight": (1,)},
        Content.CONTROLNET,
        "the original files",
        None,
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_files_by_their_names(name: str) -> None:
    shapes, content, form, family = NAMED[name]
    found = identify(shapes)
    assert (found.content, found.form, found.family) == (content, form, family)


def test_other_kinds_of_updates_are_evidence() -> None:
    found = identify({"lora_unet_a.hada_w1_a": (1,), "lora_unet_b.lora_down.weight": (1, 1)})
    assert found.evidence == ("LoHa",)


def test_an_unknown_file_has_a_nearest_miss() -> None:
    half = {name: shape for name, shape in shapes_of(UNet2DConditionModel).items() if not name.startswith("up_blocks")}
    found = identify(half)
    assert found.content is Content.UNKNOWN
    assert "it is most like UNet with the names of diffusers, but has nothing called 'up_blocks.0.'" in str(found)
    assert str(identify({"a.b.c": (1,)})) == "a file of unknown content"
    assert identify({}).content is Content.UNKNOWN


@given(st.dictionaries(st.text(max_size=30), st.lists(st.integers(0, 9), max_size=4).map(tuple), max_size=8))
def test_any_names_can_be_asked_for(shapes: Shapes) -> None:
    assert str(identify(shapes))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_files_are_read(tmp_path: Path, suffix: str) -> None:
    tensors, path = {"emb_params": torch.ones(2, 768)}, tmp_path / f"a{suffix}"
    if suffix == ".bin":
        torch.save(tensors, path)
    else:
        write_safetensors(path, tensors)
    assert identify_file(path).content is Content.TEXTUAL_INVERSION


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    for name, content in {"text": b"hello there", "pickle": pickle.dumps(print), "none": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            identify_file(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        identify_file(tmp_path / "absent")
    with pytest.raises(IsADirectoryError):
        identify_file(tmp_path)
