"""Sums, smaller ranks, other kinds as LoRAs, and LoRAs of the difference of two models: what they do to a model."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lora_specimens import (
    Factors,
    Models,
    assert_changed,
    assert_same,
    kohya_tensors,
    load_both,
    outputs,
    random_factors,
    write,
)
from torch import Tensor

from refiners.foundationals.latent_diffusion.lora import (
    LoraWeights,
    combine_loras,
    compare_loras,
    convert_lora,
    extract_lora,
    resize_lora,
    to_lora,
)
from refiners.foundationals.latent_diffusion.lora.loras import Loras
from refiners.foundationals.latent_diffusion.unet import UNet
from refiners.weights.files import read_safetensors
from refiners.weights.lora_keys import Kind

FULL_RANK = 999
TO_V = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v"


def is_some(component: str, name: str) -> bool:
    """Attention of both trees, and convolutions of two kinds."""
    return name.endswith(("to_q", "to_out.0", "v_proj", "conv1", "conv_shortcut"))


def is_value(component: str, name: str) -> bool:
    return name == "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"


def written(path: Path, factors: list[Factors], more: dict[str, Tensor] | None = None) -> Path:
    return write(path, kohya_tensors(factors) | (more or {}))


def patched(path: Path, scale: float = 1.0) -> Any:
    model, _ = load_both()
    LoraWeights(path).patch(model, scale)
    return model


def rest_of(pipeline: Any) -> dict[str, Tensor]:
    """Full differences: of a norm and of a bias."""
    torch.manual_seed(8)
    norm = pipeline.unet.mid_block.resnets[0].norm1
    bias = pipeline.unet.mid_block.resnets[0].conv1.bias
    return {
        "lora_unet_mid_block_resnets_0_norm1.w_norm": torch.randn_like(norm.weight),
        "lora_unet_mid_block_resnets_0_norm1.b_norm": torch.randn_like(norm.weight),
        "lora_unet_mid_block_resnets_0_conv1.diff_b": torch.randn_like(bias),
    }


# -- sums


def test_a_sum_is_what_its_parts_do_together(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    before = outputs(ours)
    first = random_factors(theirs, is_some)
    second = random_factors(theirs, lambda component, name: name.endswith(("to_q", "to_k")), rank=3, alpha=1.5)
    rest = rest_of(theirs)
    paths = written(tmp_path / "a.safetensors", first, rest), written(tmp_path / "b.safetensors", second)
    losses = combine_loras(dict(zip(paths, (0.7, -0.4), strict=True)), tmp_path / "sum.safetensors", ours)
    for path, scale in zip(paths, (0.7, -0.4), strict=True):
        LoraWeights(path).patch(ours, scale)
    expected = outputs(ours)
    assert_changed(before, expected)
    assert_same(outputs(patched(tmp_path / "sum.safetensors")), expected)
    assert losses.error == 0 and "nothing was lost" in str(losses)
    ranks = {update.name.replace(".", "_"): update.rank for update in second}
    layer = next(layer for layer in losses.layers if layer.rank and layer.rank > 5)
    assert 3 in ranks.values() and layer.kind is Kind.LORA


@pytest.mark.parametrize("rank", [2, FULL_RANK])
def test_a_sum_of_less_rank_loses_what_it_says(models: Models, tmp_path: Path, rank: int) -> None:
    ours, theirs = models
    factors = random_factors(theirs, lambda component, name: name == "mid_block.attentions.0.proj_in", rank=5)
    source = written(tmp_path / "a.safetensors", factors)
    losses = combine_loras({source: 0.5}, tmp_path / "b.safetensors", ours, rank)
    wanted = 0.5 * factors[0].delta().flatten(1)
    values: Any = torch.linalg.svdvals(wanted)
    best = (values[rank:].norm() / values.norm()).item()
    stored = read_safetensors(tmp_path / "b.safetensors")
    name = "lora_unet_mid_block_attentions_0_proj_in"
    assert stored[f"{name}.alpha"] == len(stored[f"{name}.lora_down.weight"]) == min(rank, 5)
    product = stored[f"{name}.lora_up.weight"].flatten(1) @ stored[f"{name}.lora_down.weight"].flatten(1)
    assert ((product - wanted).norm() / wanted.norm()).item() == pytest.approx(best, abs=1e-6)
    assert losses.error == losses.worst.error == pytest.approx(best, abs=1e-6)


def test_full_differences_are_summed_beside_loras_or_go_into_them(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    weight = theirs.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_v.weight
    first = written(tmp_path / "a.safetensors", random_factors(theirs, is_value))
    second = write(tmp_path / "b.safetensors", {f"{TO_V}.diff": 0.1 * torch.randn_like(weight)})
    for path in (first, second):
        LoraWeights(path).patch(ours, 0.5)
    for rank in (None, FULL_RANK):
        losses = combine_loras({first: 0.5, second: 0.5}, tmp_path / "sum.safetensors", ours, rank)
        kinds = [layer.kind for layer in losses.layers]
        assert kinds == ([Kind.LORA, Kind.DIFFERENCE] if rank is None else [Kind.LORA])
        assert_same(outputs(patched(tmp_path / "sum.safetensors")), outputs(ours))


# -- smaller ranks


def test_each_layer_gets_the_rank_that_keeps_the_energy(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    factors = random_factors(theirs, is_some, rank=6)
    source = written(tmp_path / "a.safetensors", factors, rest_of(theirs))
    losses = resize_lora(source, tmp_path / "b.safetensors", ours, energy=0.95)
    loras = [layer for layer in losses.layers if layer.kind is Kind.LORA]
    assert len({layer.rank for layer in loras}) > 1
    for layer in loras:
        assert layer.error <= math.sqrt(0.05) + 1e-6
    again = resize_lora(source, tmp_path / "c.safetensors", ours, rank=2, energy=0.95)
    assert max(layer.rank or 0 for layer in again.layers) == 2
    assert again.error > losses.error > 0
    kept = read_safetensors(tmp_path / "c.safetensors")
    assert all(torch.equal(kept[key], tensor) for key, tensor in rest_of(theirs).items())


def test_the_whole_rank_is_the_same_lora(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    source = written(tmp_path / "a.safetensors", random_factors(theirs, is_some))
    resize_lora(source, tmp_path / "b.safetensors", ours, rank=FULL_RANK)
    comparison = compare_loras(source, tmp_path / "b.safetensors", ours)
    assert comparison.equal_count == 0 and comparison.error < 1e-5
    assert_same(outputs(patched(tmp_path / "b.safetensors")), outputs(patched(source)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_number_format_stays(models: Models, tmp_path: Path, dtype: torch.dtype) -> None:
    ours, theirs = models
    tensors = {key: tensor.to(dtype) for key, tensor in kohya_tensors(random_factors(theirs, is_some)).items()}
    source = write(tmp_path / "a.safetensors", tensors)
    resize_lora(source, tmp_path / "b.safetensors", ours, rank=2)
    stored = read_safetensors(tmp_path / "b.safetensors")
    assert {tensor.dtype for key, tensor in stored.items() if not key.endswith("alpha")} == {dtype}


# -- other kinds as LoRAs


def kron_tensors(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A LoKr whose matrix is of rank 2 · 2, for a linear layer of sizes that 4 divides."""
    torch.manual_seed(4)
    out, inner = weight.shape
    tensors = {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (out // 4, 2), "lokr_w2_b": (2, inner // 4)}
    return {f"{name}.{part}": torch.randn(shape) for part, shape in tensors.items()} | {
        f"{name}.alpha": torch.tensor(1.5)
    }


def loha_tensors(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A LoHa whose matrix is of rank 2 · 2."""
    torch.manual_seed(6)
    out, inner = weight.shape
    shapes = {"hada_w1_a": (out, 2), "hada_w1_b": (2, inner), "hada_w2_a": (out, 2), "hada_w2_b": (2, inner)}
    return {f"{name}.{part}": torch.randn(shape) for part, shape in shapes.items()} | {
        f"{name}.alpha": torch.tensor(1.5)
    }


@pytest.mark.parametrize(("build", "rank"), [(kron_tensors, 4), (loha_tensors, 4)])
def test_products_of_other_kinds_are_loras_of_their_rank(models: Models, tmp_path: Path, build: Any, rank: int) -> None:
    ours, theirs = models
    before = outputs(ours)
    weight = theirs.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_v.weight
    source = write(tmp_path / "a.safetensors", build(TO_V, weight))
    losses = to_lora(source, tmp_path / "b.safetensors", meta(ours), energy=1.0)
    assert [layer.rank for layer in losses.layers] == [rank]
    assert losses.error < 1e-5
    expected = outputs(patched(source))
    assert_changed(before, expected, "unet")
    assert_same(outputs(patched(tmp_path / "b.safetensors")), expected)
    smaller = to_lora(source, tmp_path / "b.safetensors", ours, rank=1)
    assert 0.01 < smaller.error < 1
    assert "lost" in str(smaller) and smaller.worst.path in str(smaller)
    with pytest.raises(ValueError, match="no plain LoRA in this file"):
        resize_lora(source, tmp_path / "c.safetensors", ours, rank=1)
    with pytest.raises(ValueError, match=r"is no LoRA, so sums need a rank"):
        combine_loras({source: 1.0}, tmp_path / "c.safetensors", ours)


def meta(model: Any) -> Any:
    trees = {name: copy.deepcopy(getattr(model, name)).to("meta") for name in ("unet", "clip_text_encoder")}
    return SimpleNamespace(**trees)


def test_full_differences_become_loras(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    weight = theirs.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_v.weight
    source = write(tmp_path / "a.safetensors", {f"{TO_V}.diff": torch.randn_like(weight), **rest_of(theirs)})
    losses = to_lora(source, tmp_path / "b.safetensors", ours, rank=FULL_RANK)
    assert [layer.kind for layer in losses.layers].count(Kind.LORA) == 1
    assert_same(outputs(patched(tmp_path / "b.safetensors")), outputs(patched(source)))


# -- the difference of two models


def test_extraction_finds_the_lora_that_was_merged(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    base: Any = SimpleNamespace(**{name: copy.deepcopy(getattr(ours, name)) for name in ("unet", "clip_text_encoder")})
    factors = random_factors(theirs, is_some)
    source = written(tmp_path / "a.safetensors", factors, rest_of(theirs))
    expected = outputs(patched(source))
    LoraWeights(source).patch(ours)
    with pytest.raises(ValueError, match="has weight updates on it"):
        extract_lora(ours, base, tmp_path / "b.safetensors", rank=5)
    Loras(ours, {}).merge()
    losses = extract_lora(ours, base, tmp_path / "b.safetensors", rank=5)
    assert losses.error < 1e-4
    assert max(layer.rank or 0 for layer in losses.layers) == 5
    assert {layer.kind for layer in losses.layers} == {Kind.LORA, Kind.NORM, Kind.DIFFERENCE}
    assert_same(outputs(patched(tmp_path / "b.safetensors")), expected, tolerance=1e-4)
    part = extract_lora(ours, base, tmp_path / "c.safetensors", rank=5, is_complete=False, format="diffusers")
    assert {layer.error for layer in part.layers if layer.kind is not Kind.LORA} == {1.0}
    assert all("lora_" in key for key in read_safetensors(tmp_path / "c.safetensors"))


def test_equal_models_and_models_of_other_sizes_are_refused(models: Models, tmp_path: Path) -> None:
    ours, _ = models
    with pytest.raises(ValueError, match="equal weights, so there is nothing to extract"):
        extract_lora(ours, ours, tmp_path / "b.safetensors", rank=5)
    other: Any = SimpleNamespace(unet=UNet(device="meta"), clip_text_encoder=ours.clip_text_encoder)
    with pytest.raises(ValueError, match="only one of the two models has"):
        extract_lora(other, ours, tmp_path / "b.safetensors", rank=5)


# -- comparing files


def test_files_are_compared_layer_by_layer(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    factors = random_factors(theirs, is_some)
    source = written(tmp_path / "a.safetensors", factors)
    convert_lora(source, tmp_path / "same", ours, "peft")
    same = compare_loras(source, tmp_path / "same", meta(ours))
    assert same.equal_count == len(same.layers) == len(factors) and same.error == 0
    assert str(same) == f"{len(factors)} of {len(factors)} layers are equal bit by bit"
    convert_lora(source, tmp_path / "half.safetensors", ours, dtype=torch.float16)
    half = compare_loras(source, tmp_path / "half.safetensors", meta(ours))
    assert half.equal_count == 0 and 1e-5 < half.error < 1e-3
    factors[0].alpha = 100.0
    factors.pop()
    other = compare_loras(source, written(tmp_path / "c.safetensors", factors), ours)
    assert other.equal_count == len(factors) - 1
    assert math.isinf(other.error)
