"""Every way of naming the layers in LoRA files: all keys find their place, and the model computes the merged weights.

The names are built from those of diffusers' and transformers' modules, as each program documents its own.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from lora_specimens import (
    Factors,
    Models,
    assert_changed,
    assert_same,
    kohya_tensors,
    load_both,
    merge,
    outputs,
    random_factors,
    their_outputs,
    write,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import refiners.fluxion.layers as fl
from refiners.foundationals.clip import CLIPTextEncoderL
from refiners.foundationals.latent_diffusion import UNet
from refiners.foundationals.latent_diffusion.lora import LoraWeights
from refiners.foundationals.latent_diffusion.unet import SpatialTransformer

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
Form = Callable[[Factors], dict[str, Tensor]]


def is_attention(component: str, name: str) -> bool:
    return "resnets" not in name and name.endswith(ATTENTION)


def factors_named(name: str, update: Factors, down: str, up: str, alpha: str = "") -> dict[str, Tensor]:
    named = {f"{name}{down}": update.down, f"{name}{up}": update.up}
    return named | ({f"{name}{alpha}": torch.tensor(update.alpha)} if alpha and update.alpha is not None else {})


def sgm_name(name: str, levels: int = 2) -> str:
    """A UNet module as the original files number it: three steps a level, counted through."""
    words = name.split(".")
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
    inner |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    outer = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
    outer |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    if name in outer:
        return outer[name]
    if words[0] == "mid_block":
        step = "middle_block.1" if words[1] == "attentions" else f"middle_block.{2 * int(words[2])}"
        rest = words[3:]
    else:
        level, kind, block = int(words[1]), words[2], int(words[3])
        rest = words[4:]
        if kind == "downsamplers":
            return f"input_blocks.{3 * level + 3}.0.op"
        if kind == "upsamplers":
            has_attention = level > 0  # the lowest level of the small model has none
            return f"output_blocks.{3 * level + 2}.{1 + has_attention}.conv"
        number = 3 * level + block + (1 if words[0] == "down_blocks" else 0)
        prefix = "input_blocks" if words[0] == "down_blocks" else "output_blocks"
        step = f"{prefix}.{number}.{int(kind == 'attentions')}"
    is_residual = "resnets" in words
    return ".".join([step, *([inner[rest[0]]] if is_residual else rest)])


def sgm_kohya(update: Factors) -> dict[str, Tensor]:
    name = f"lora_unet_{sgm_name(update.name).replace('.', '_')}"
    return factors_named(name, update, ".lora_down.weight", ".lora_up.weight", ".alpha")


def comfy(update: Factors) -> dict[str, Tensor]:
    name = f"diffusion_model.{sgm_name(update.name)}"
    return factors_named(name, update, ".lora_down.weight", ".lora_up.weight", ".alpha")


def sdxl_kohya(update: Factors) -> dict[str, Tensor]:
    tensors = kohya_tensors([update])
    return {key.replace("lora_te_", "lora_te1_"): tensor for key, tensor in tensors.items()}


def one_trainer(update: Factors) -> dict[str, Tensor]:
    prefix = "lora_unet" if update.component == "unet" else "lora_te"
    return factors_named(f"{prefix}.{update.name}", update, ".lora_down.weight", ".lora_up.weight", ".alpha")


def diffusers_linear_layer(update: Factors) -> dict[str, Tensor]:
    holder = ".lora" if update.component == "unet" else ".lora_linear_layer"
    name = f"{update.component}.{update.name}"
    return factors_named(name, update, f"{holder}.down.weight", f"{holder}.up.weight", ".alpha")


def diffusers_peft(update: Factors) -> dict[str, Tensor]:
    name = f"{update.component}.{update.name}"
    return factors_named(name, update, ".lora_A.weight", ".lora_B.weight", ".alpha")


def bare_peft(update: Factors) -> dict[str, Tensor]:
    return factors_named(update.name, update, ".lora_A.weight", ".lora_B.weight", ".alpha")


def peft(update: Factors) -> dict[str, Tensor]:
    name = f"base_model.model.{update.name.removeprefix('text_model.')}"
    return factors_named(name, update, ".lora_A.default.weight", ".lora_B.default.weight")


def processors(prefix: bool) -> Form:
    def name(update: Factors) -> dict[str, Tensor]:
        module, _, projection = update.name.removesuffix(".0").rpartition(".")
        short = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}.get(projection, projection)
        holder = "processor." if update.component == "unet" else ""
        start = f"{update.component}." if prefix or update.component != "unet" else ""
        return factors_named(f"{start}{module}.{holder}{short}_lora", update, ".down.weight", ".up.weight")

    return name


# name: the form, which layers it can name, whether it says alphas
EVERYTHING: Callable[[str, str], bool] = lambda component, name: True  # noqa: E731
FORMS: dict[str, tuple[Form, Callable[[str, str], bool], bool]] = {
    "kohya": (lambda update: kohya_tensors([update]), EVERYTHING, True),
    "kohya without alphas": (lambda update: kohya_tensors([update]), EVERYTHING, False),
    "kohya, two text encoders": (sdxl_kohya, EVERYTHING, True),
    "kohya, original names": (sgm_kohya, lambda component, name: component == "unet", True),
    "ComfyUI": (comfy, lambda component, name: component == "unet", True),
    "OneTrainer": (one_trainer, EVERYTHING, True),
    "diffusers": (diffusers_peft, EVERYTHING, True),
    "diffusers, unprefixed": (bare_peft, EVERYTHING, True),
    "diffusers, linear layers": (diffusers_linear_layer, EVERYTHING, True),
    "diffusers, attention processors": (processors(prefix=True), is_attention, False),
    "diffusers, unprefixed attention processors": (processors(prefix=False), is_attention, False),
    "peft": (peft, EVERYTHING, False),
}


def tensors_in(form: str, pipeline: Any) -> tuple[dict[str, Tensor], list[Factors]]:
    build, wanted, has_alphas = FORMS[form]
    factors = random_factors(pipeline, wanted, has_alphas=has_alphas)
    tensors: dict[str, Tensor] = {}
    for update in factors:
        tensors |= build(update)
    assert len(tensors) == (3 if has_alphas else 2) * len(factors)
    return tensors, factors


@pytest.mark.parametrize("form", FORMS)
def test_a_file_does_what_its_merged_weights_do(models: Models, tmp_path: Path, form: str) -> None:
    ours, theirs = models
    before = outputs(ours)
    tensors, factors = tensors_in(form, theirs)
    path = tmp_path / "a"
    if "processors" in form:  # at that time, files were torch's
        torch.save(tensors, path)
    else:
        write(path, tensors)
    report = LoraWeights(path).patch(ours)
    merge(theirs, factors)
    expected = their_outputs(theirs)
    assert_changed(before, expected, "unet" if all(update.component == "unet" for update in factors) else "both")
    assert_same(outputs(ours), expected)
    assert len(report.attached) == len(factors) and not report.left_out
    strengths = {(update.rank, update.alpha or float(update.rank)) for update in factors}
    assert {(update.rank, update.alpha) for update in report.attached} == strengths


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_key_of_the_full_size_finds_its_place(tmp_path: Path, form: str) -> None:
    with torch.device("meta"):
        theirs = SimpleNamespace(unet=UNet2DConditionModel(cross_attention_dim=768), text_encoder=text_encoder())
    model = SimpleNamespace(unet=UNet(device="meta"), clip_text_encoder=CLIPTextEncoderL(device="meta"))
    build, wanted, has_alphas = FORMS[form]
    tensors: dict[str, Tensor] = {}
    for component in ("unet", "text_encoder"):
        for name, module in getattr(theirs, component).named_modules():
            full = f"text_model.{name}" if component == "text_encoder" else name
            if isinstance(module, nn.Linear | nn.Conv2d) and wanted(component, full):
                out, *inner = module.weight.shape
                down, up = torch.zeros(1, *inner), torch.zeros(out, 1, *[1] * (len(inner) - 1))
                tensors |= build(Factors(component, full, down, up, 1.0 if has_alphas else None))
    report = LoraWeights(write(tmp_path / "a.safetensors", tensors)).patch(model)
    assert len(report.attached) == len(tensors) // (3 if has_alphas else 2)
    counts = {"kohya, original names": 282, "ComfyUI": 282, "diffusers, attention processors": 128 + 48}
    counts["diffusers, unprefixed attention processors"] = 128 + 48
    assert len(report.attached) == counts.get(form, 282 + 72)


def text_encoder() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )


# -- forms of the factors


@pytest.mark.parametrize("is_stored_as_linear", [True, False])
def test_factors_of_1x1_convolutions_and_linear_layers_are_interchangeable(
    models: Models, tmp_path: Path, is_stored_as_linear: bool
) -> None:
    ours, theirs = models
    wanted = "proj_in" if is_stored_as_linear else "to_q"
    factors = random_factors(theirs, lambda component, name: wanted in name)
    merge(theirs, factors)
    for update in factors:
        shape = (-1,) if is_stored_as_linear else (-1, 1, 1)
        update.down = update.down.reshape(update.rank, *shape)
        update.up = update.up.reshape(
            update.up.shape[0], *([update.rank] if is_stored_as_linear else [update.rank, 1, 1])
        )
    LoraWeights(write(tmp_path / "a.safetensors", kohya_tensors(factors))).patch(ours)
    assert_same(outputs(ours), their_outputs(theirs))


def test_tucker_cores_of_convolutions(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    before = outputs(ours)
    factors = random_factors(theirs, lambda component, name: name.endswith(("conv1", "conv2", "conv")))
    tensors = kohya_tensors(factors)
    generator = torch.Generator().manual_seed(3)
    for update in factors:
        name = f"lora_unet_{update.name.replace('.', '_')}"
        first = torch.randn(update.rank, update.down.shape[1], 1, 1, generator=generator)
        core = 0.05 * torch.randn(update.rank, update.rank, 3, 3, generator=generator)
        tensors |= {f"{name}.lora_down.weight": first, f"{name}.lora_mid.weight": core}
        units = torch.eye(first.shape[1]).reshape(first.shape[1], -1, 1, 1)  # each channel alone, at one point
        responses = nn.functional.conv2d(nn.functional.conv2d(units, first), core.flip(2, 3), padding=2)
        update.down = responses.transpose(0, 1)
    LoraWeights(write(tmp_path / "a.safetensors", tensors)).patch(ours)
    merge(theirs, factors)
    expected = their_outputs(theirs)
    assert_changed(before, expected, "unet")
    assert_same(outputs(ours), expected)


# -- the first Refiners' own files, where only order tells

TARGETS: dict[str, type[fl.Chain]] = {
    "Attention": fl.Attention,
    "SelfAttention": fl.SelfAttention,
    "CrossAttentionBlock2d": SpatialTransformer,
    "self": fl.Chain,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("is_up_first", [True, False])
def test_files_of_the_first_refiners(models: Models, tmp_path: Path, target: str, is_up_first: bool) -> None:
    ours, _ = models
    tensors: dict[str, Tensor] = {}
    metadata = {"unet_targets": target, "text_encoder_targets": "SelfAttention"}
    expected = load_both()[0]
    for prefix, tree, kind in (
        ("unet", expected.unet, TARGETS[target]),
        ("text_encoder", expected.clip_text_encoder, fl.SelfAttention),
    ):
        linears = [linear for block in tree.layers(kind) for linear in block.layers(nn.Linear)]
        for index, linear in enumerate(linears):
            down, up = 0.1 * torch.randn(2, linear.in_features), 0.1 * torch.randn(linear.out_features, 2)
            pair = (up, down) if is_up_first else (down, up)
            tensors |= {f"{prefix}.{2 * index + place:03d}": tensor for place, tensor in enumerate(pair)}
            linear.weight.data += up @ down
    report = LoraWeights(write(tmp_path / "a.safetensors", tensors, metadata)).patch(ours)
    assert len(report.attached) == len(tensors) // 2
    assert_same(outputs(ours), outputs(expected))


@pytest.mark.parametrize(
    ("metadata", "extra", "message"),
    [
        ({}, {}, "its header has no unet_targets"),
        ({"unet_targets": "Block"}, {}, "names 'Block', but known are self, Attention"),
        ({"unet_targets": "Attention"}, {}, "2 tensors unet.…, but the 48 layers"),
        ({"unet_targets": "Attention"}, {"lda.000": torch.ones(1)}, "'lda.000' has no place"),
    ],
)
def test_files_of_the_first_refiners_that_do_not_fit(
    models: Models, tmp_path: Path, metadata: dict[str, str], extra: dict[str, Tensor], message: str
) -> None:
    tensors = {"unet.000": torch.ones(32, 2), "unet.001": torch.ones(2, 32), **extra}
    with pytest.raises(ValueError, match=message):
        LoraWeights(write(tmp_path / "a.safetensors", tensors, metadata)).patch(models[0])
