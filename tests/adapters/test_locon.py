"""LoCons, low-rank updates of convolutions, with and without a core, compute what LyCORIS' compute; and rsLoRA."""

import math
import warnings
from typing import Any

import pytest
import torch
from delta_specimens import BATCH, LAYERS, as_torch, assert_close, assert_same_as, peft_on, with_deltas, with_values
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.adapters.deltas import make_delta
from refiners.adapters.lora import Conv2dLora
from refiners.weights.lora_keys.kinds import Kind

with warnings.catch_warnings():  # what others deprecate is not ours to fix
    warnings.simplefilter("ignore")
    from lycoris.modules.locon import LoConModule
    from peft import LoraConfig

NAMES = {"lora_down.weight": "down", "lora_mid.weight": "mid", "lora_up.weight": "up"}
KERNELS = ["conv 3x3", "stride 2", "uneven"]
each_kernel = pytest.mark.parametrize("kind", KERNELS)


def layer_and_input(kind: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return LAYERS[kind][0](), torch.randn(LAYERS[kind][1])


def with_core(layer: Any, name: str = "a", rank: int = 3, seed: int = 0, **more: Any) -> Conv2dLora:
    out, inner, *kernel = layer.weight.shape
    parts = {
        "down": torch.empty(rank, inner, 1, 1),
        "mid": torch.empty(rank, rank, *kernel),
        "up": torch.empty(out, rank, 1, 1),
    }
    with_values(parts.values(), seed)
    return Conv2dLora.from_parts(layer, name, parts, **more)


def clones(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {part: tensor.detach().clone() for part, tensor in weights.items()}


@pytest.mark.parametrize("has_core", [False, True])
@pytest.mark.parametrize(("rank", "alpha", "is_stabilised"), [(1, 1.0, False), (3, 1.7, False), (4, 3.0, True)])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_locon_computes_what_lycoris_computes(
    kind: str, rank: int, alpha: float, is_stabilised: bool, has_core: bool
) -> None:
    layer, x = layer_and_input(kind)
    theirs = LoConModule("a", as_torch(layer), lora_dim=rank, alpha=alpha, use_tucker=has_core, rs_lora=is_stabilised)
    weights = {NAMES[part]: tensor for part, tensor in theirs.named_parameters()}
    with_values(weights.values(), seed=1)
    delta = make_delta(layer, "a", Kind.LORA, clones(weights), theirs.alpha.item())
    assert_same_as(theirs, weights, layer, delta, x)


@pytest.mark.parametrize(("rank", "alpha"), [(1, 2.0), (4, 3.0), (5, 8.0)])
@pytest.mark.parametrize("kind", ["linear", "conv 3x3"])
def test_rank_stabilised_loras_compute_what_peft_computes(kind: str, rank: int, alpha: float) -> None:
    layer, x = layer_and_input(kind)
    theirs, tensors = peft_on(layer, LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"], use_rslora=True))
    weights = {"down": tensors["lora_A.default.weight"], "up": tensors["lora_B.default.weight"]}
    delta = make_delta(layer, "a", Kind.LORA, clones(weights), alpha * math.sqrt(rank))
    assert_same_as(theirs, weights, layer, delta, x)


@each_kernel
def test_a_core_makes_one_update_of_the_weight(kind: str) -> None:
    layer, x = layer_and_input(kind)
    delta = with_core(layer, alpha=1.3, scale=-0.7)
    weight = layer.weight + delta.delta_weight(layer.weight)
    expected = torch.func.functional_call(layer, {"weight": weight}, (x,))
    assert_close(layer(x) + delta(x), expected)
    assert_close(with_deltas(layer, delta)(x), expected)


@each_kernel
def test_loras_with_a_core_and_without_add_up(kind: str) -> None:
    layer, x = layer_and_input(kind)
    plain = make_delta(layer, "plain", Kind.LORA, plain_parts(layer))
    deltas = [with_core(layer, "one"), with_core(layer, "two", rank=2, seed=1, scale=0.3), plain]
    assert_close(with_deltas(layer, *deltas)(x), sum((delta.update(x, x, layer) for delta in deltas), layer(x)))


@each_kernel
def test_each_sample_may_have_its_own_scale_of_a_core(kind: str) -> None:
    layer, x = layer_and_input(kind)
    delta = with_core(layer, scale=(0.0, 0.5, 1.0))
    chain = with_deltas(layer, delta)
    together, alone = chain(x), delta(x)
    for index in range(BATCH):
        delta.scale = (0.0, 0.5, 1.0)[index % 3]
        assert_close(together[index], chain(x)[index])
        assert_close(layer(x)[index] + alone[index], chain(x)[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parts_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    layer, _ = layer_and_input("conv 3x3")
    parts = {part: tensor.detach().to(dtype) for part, tensor in with_core(layer).parts().items()}
    again = Conv2dLora.from_parts(layer, "a", parts).parts()
    assert again.keys() == parts.keys()
    assert all(again[part].data_ptr() == parts[part].data_ptr() for part in parts)


@pytest.mark.parametrize(("base", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_a_core_may_be_of_another_format_than_the_layer(base: torch.dtype, tolerance: float) -> None:
    layer, x = layer_and_input("conv 3x3")
    delta = with_core(layer)
    expected = layer(x) + delta(x)
    layer.to(base)
    output = with_deltas(layer, delta)(x.to(base))
    assert output.dtype == base
    assert_close(output.float(), expected, tolerance)


def plain_parts(layer: Any, rank: int = 2) -> dict[str, Tensor]:
    out, *inner = layer.weight.shape
    return {"down": torch.randn(rank, *inner), "up": torch.randn(out, rank, 1, 1)}


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        ("down", (2, 12, 5, 5)),
        ("down", (2, 11, 3, 3)),
        ("up", (20, 3, 1, 1)),
        ("up", (19, 2, 1, 1)),
        ("up", (20, 2, 3, 3)),
    ],
)
def test_parts_of_another_shape_are_explained(part: str, shape: tuple[int, ...]) -> None:
    layer, _ = layer_and_input("conv 3x3")
    with pytest.raises(ValueError, match=f"LoRA 'a': the {part} weight has shape"):
        Conv2dLora.from_parts(layer, "a", plain_parts(layer) | {part: torch.ones(shape)})


@pytest.mark.parametrize(
    ("part", "shape"),
    [("down", (3, 12, 3, 3)), ("mid", (3, 3, 5, 5)), ("mid", (3, 2, 3, 3)), ("mid", (3, 3)), ("up", (20, 4, 1, 1))],
)
def test_parts_of_another_shape_around_a_core_are_explained(part: str, shape: tuple[int, ...]) -> None:
    layer, _ = layer_and_input("conv 3x3")
    with pytest.raises(ValueError, match=f"LoRA 'a': the {part} weight has shape"):
        Conv2dLora.from_parts(layer, "a", with_core(layer).parts() | {part: torch.ones(shape)})


def test_a_core_for_a_layer_of_groups_is_refused() -> None:
    layer = fl.Conv2d(12, 20, kernel_size=3, groups=2)
    parts = {"down": torch.ones(2, 6, 1, 1), "mid": torch.ones(2, 2, 3, 3), "up": torch.ones(20, 2, 1, 1)}
    with pytest.raises(ValueError, match="has a mid weight, and the layer has 2 groups"):
        Conv2dLora.from_parts(layer, "a", parts)
