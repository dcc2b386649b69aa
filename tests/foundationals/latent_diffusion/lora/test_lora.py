"""LoRA files as peft and diffusers write them today: the patched model computes what theirs computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from lora_specimens import (
    Models,
    assert_changed,
    assert_same,
    kohya_tensors,
    merge,
    outputs,
    random_factors,
    their_outputs,
    write,
)
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.latent_diffusion.lora import LoraWeights
from refiners.weights.files import read_metadata

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "conv_shortcut", "conv2"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def configs(**options: Any) -> dict[str, Any]:
    """Settings with ranks and alphas that differ between layers."""
    unet = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=UNET_TARGETS,
        rank_pattern={"to_q": 3, "mid_block.attentions.0.proj_in": 2},
        alpha_pattern={"to_k": 1.5, r"^down_blocks.0.resnets.0.conv1": 9},
        init_lora_weights=False,
        **options,
    )
    text = LoraConfig(
        r=3,
        lora_alpha=2,
        target_modules=TEXT_TARGETS,
        rank_pattern={"encoder.layers.0.mlp.fc1": 5},
        alpha_pattern={"self_attn.q_proj": 4},
        init_lora_weights=False,
        **options,
    )
    return {"unet": unet, "text_encoder": text}


def shrink(model: nn.Module) -> None:
    """peft's random start is so strong that the base does not matter any more."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.1)


def add_adapters(pipeline: Any, **options: Any) -> None:
    torch.manual_seed(3)
    for name, config in configs(**options).items():
        getattr(pipeline, name).add_adapter(config)
        shrink(getattr(pipeline, name))


def save_by_diffusers(pipeline: Any, folder: Path, with_metadata: bool) -> None:
    parts = {name: getattr(pipeline, name) for name in ("unet", "text_encoder")}
    StableDiffusionPipeline.save_lora_weights(
        folder,
        **{f"{name}_lora_layers": get_peft_model_state_dict(part) for name, part in parts.items()},
        **(_collate_lora_metadata(parts) if with_metadata else {}),
    )


@pytest.mark.parametrize("is_rank_stabilised", [False, True])
def test_a_file_of_diffusers_computes_the_same(models: Models, tmp_path: Path, is_rank_stabilised: bool) -> None:
    ours, theirs = models
    before = outputs(ours)
    add_adapters(theirs, use_rslora=is_rank_stabilised)
    save_by_diffusers(theirs, tmp_path, with_metadata=True)
    report = LoraWeights(tmp_path / "pytorch_lora_weights.safetensors").patch(ours)
    expected = their_outputs(theirs)
    assert_changed(before, expected)
    assert_same(outputs(ours), expected)
    layers = [name for part in (theirs.unet, theirs.text_encoder) for name, _ in part.named_modules()]
    assert len(report.attached) == sum(name.endswith("lora_A.default") for name in layers) > 40
    assert not report.left_out


def test_a_file_without_settings_has_alphas_of_its_ranks(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    add_adapters(theirs)
    save_by_diffusers(theirs, tmp_path, with_metadata=False)
    report = LoraWeights(tmp_path).patch(ours)
    assert {update.alpha / update.rank for update in report.attached} == {1.0}
    assert {update.rank for update in report.attached} == {2, 3, 4, 5}


@pytest.mark.slow
@pytest.mark.parametrize("is_rank_stabilised", [False, True])
def test_adapter_folders_of_peft_compute_the_same(models: Models, tmp_path: Path, is_rank_stabilised: bool) -> None:
    ours, theirs = models
    before = outputs(ours)
    torch.manual_seed(3)
    for name, config in configs(use_rslora=is_rank_stabilised).items():
        wrapped: Any = get_peft_model(getattr(theirs, name), config)
        shrink(wrapped)
        wrapped.save_pretrained(tmp_path / name)
    whole = LoraWeights(tmp_path)
    whole.patch(ours)
    expected = their_outputs(theirs)
    assert_changed(before, expected)
    assert_same(outputs(ours), expected)
    whole.eject()
    for name in ("unet", "text_encoder"):
        LoraWeights(tmp_path / name, name=name).patch(ours)
    assert_same(outputs(ours), expected)


def test_a_state_dict_of_peft_with_the_adapters_name_in_its_keys(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    torch.manual_seed(3)
    wrapped: Any = get_peft_model(
        theirs.unet, LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False)
    )
    shrink(wrapped)
    tensors = {key: tensor.clone() for key, tensor in wrapped.state_dict().items() if "lora_" in key}
    assert all(".default.weight" in key for key in tensors)
    report = LoraWeights(write(tmp_path / "a.safetensors", tensors)).patch(ours)
    assert len(report.attached) == len(tensors) // 2
    assert_same(outputs(ours), their_outputs(theirs))


@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_a_kohya_file_computes_what_diffusers_computes(models: Models, tmp_path: Path, scale: float) -> None:
    ours, theirs = models
    # diffusers takes the alpha of one layer for that of all, so here they are equal
    factors = random_factors(theirs, lambda component, name: "attn" in name or "mlp" in name, rank=2, alpha=1.5)
    path = write(tmp_path / "a.safetensors", kohya_tensors(factors))
    report = LoraWeights(path).patch(ours, scale=scale)
    theirs.load_lora_weights(path)
    theirs.set_adapters(["default_0"], [scale])
    assert len(report.attached) == len(factors)
    assert_same(outputs(ours), their_outputs(theirs))


def test_stacked_files_add_up_and_come_off_bit_by_bit_in_any_order(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    before, keys = outputs(ours), list(ours.unet.state_dict())
    first = random_factors(theirs)
    second = random_factors(theirs, lambda component, name: "attn" in name, rank=3, alpha=2.0)
    weights = [
        LoraWeights(write(tmp_path / f"{name}.safetensors", kohya_tensors(factors)))
        for name, factors in (("a", first), ("b", second))
    ]
    names = [lora.patch(ours, scale=scale).name for lora, scale in zip(weights, (0.5, 0.8), strict=True)]
    assert names == ["a", "b"]
    merge(theirs, first, 0.5)
    merge(theirs, second, 0.8)
    assert_same(outputs(ours), their_outputs(theirs))
    weights[0].scale = 0.0
    merge(theirs, first, -0.5)
    assert_same(outputs(ours), their_outputs(theirs))
    for lora in weights:
        lora.eject()
    assert all(torch.equal(now, then) for now, then in zip(outputs(ours), before, strict=True))
    assert list(ours.unet.state_dict()) == keys and ours.unet.find(LoraAdapter) is None


def test_files_of_one_name_get_names_of_their_own(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    path = write(tmp_path / "x.safetensors", kohya_tensors(random_factors(theirs)))
    assert [LoraWeights(path).patch(ours).name for _ in range(3)] == ["x", "x_2", "x_3"]
    with pytest.raises(ValueError, match="there is a LoRA 'x_2' on this model already"):
        LoraWeights(path, name="x_2").patch(ours)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_are_brought_to_the_format_of_the_layers(
    models: Models, tmp_path: Path, stored: torch.dtype, dtype: torch.dtype | None
) -> None:
    ours, theirs = models
    factors = random_factors(theirs, lambda component, name: "attn" in name)
    for update in factors:
        update.down, update.up = update.down.to(stored), update.up.to(stored)
    path = write(tmp_path / "a.safetensors", kohya_tensors(factors))
    report = LoraWeights(path, dtype=dtype).patch(ours)
    assert {update.dtype for update in report.attached} == {dtype or torch.float32}
    merge(theirs, factors)
    assert_same(outputs(ours), their_outputs(theirs), tolerance=2e-2 if dtype else 1e-5)


def test_the_report_says_what_attached(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    factors = random_factors(theirs, lambda component, name: name == "mid_block.attentions.0.proj_in")
    path = write(tmp_path / "a.safetensors", kohya_tensors(factors))
    report = LoraWeights(path).patch(ours)
    (update,) = report.attached
    assert update.path == "unet.MiddleBlock.SpatialTransformer.Conv2d_1"
    assert update.key == "lora_unet_mid_block_attentions_0_proj_in"
    assert (update.rank, update.alpha, str(update.kind), update.dtype) == (1, 0.5, "LoRA", torch.float32)
    assert str(report) == f"{path} as 'a': 1 layer of unet; LoRA of rank 1, strength 0.5"


def test_settings_in_the_header_are_read_as_diffusers_reads_them(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    add_adapters(theirs)
    save_by_diffusers(theirs, tmp_path, with_metadata=True)
    settings = json.loads(read_metadata(tmp_path / "pytorch_lora_weights.safetensors")["lora_adapter_metadata"])
    assert settings["unet.lora_alpha"] == 6
    report = LoraWeights(tmp_path / "pytorch_lora_weights.safetensors").patch(ours)
    alphas = {update.key: update.alpha for update in report.attached}
    assert alphas["unet.down_blocks.0.resnets.0.conv1"] == 9
    assert alphas["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"] == 1.5
    assert alphas["unet.mid_block.attentions.0.proj_in"] == 6


def test_weights_are_on_one_model_at_a_time(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    lora = LoraWeights(write(tmp_path / "a.safetensors", kohya_tensors(random_factors(theirs))))
    with pytest.raises(RuntimeError, match="on no model"):
        lora.eject()
    with pytest.raises(RuntimeError, match="call patch first"):
        _ = lora.scale
    lora.patch(ours, scale=0.25)
    assert lora.scale == 0.25
    with pytest.raises(RuntimeError, match="on a model already"):
        lora.patch(ours)
