"""LoHas compute what LyCORIS' and peft's compute; outputs and the gradients of every tensor."""

import warnings

import pytest
import torch
from delta_specimens import LAYERS, as_torch, assert_same_as, peft_on, with_values

import refiners.fluxion.layers as fl
from refiners.adapters.loha import Loha

with warnings.catch_warnings():  # what others deprecate is not ours to fix
    warnings.simplefilter("ignore")
    from lycoris.modules.loha import LohaModule
    from peft import LoHaConfig


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("has_cores", [False, True])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (3, 1.7), (4, 16.0)])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_loha_computes_what_lycoris_computes(kind: str, rank: int, alpha: float, has_cores: bool) -> None:
    torch.manual_seed(rank)
    layer, x = LAYERS[kind][0](), torch.randn(LAYERS[kind][1])
    theirs = LohaModule("a", as_torch(layer), lora_dim=rank, alpha=alpha, use_tucker=has_cores)
    weights = {part.removeprefix("hada_"): tensor for part, tensor in theirs.named_parameters()}
    with_values(weights.values(), seed=1)
    parts = {part: tensor.detach().clone() for part, tensor in weights.items()}
    assert_same_as(theirs, weights, layer, Loha.from_parts(layer, "a", parts, alpha), x)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("has_cores", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv 1x1", "conv 3x3", "stride 2"])
def test_a_loha_computes_what_peft_computes(kind: str, has_cores: bool) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[kind][0](), torch.randn(LAYERS[kind][1])
    config = LoHaConfig(r=3, alpha=5, target_modules=["layer"], use_effective_conv2d=has_cores)
    theirs, tensors = peft_on(layer, config)
    weights = {part.removeprefix("hada_"): tensor for part, tensor in tensors.items()}
    parts = {part: tensor.detach().clone() for part, tensor in weights.items()}
    if "t1" in parts:  # peft's own way back takes the core of the other matrix for these two
        weights = {part: tensor for part, tensor in weights.items() if part not in ("w1_a", "w2_a")}
    assert_same_as(theirs, weights, layer, Loha.from_parts(layer, "a", parts, 5.0), x)


@pytest.mark.parametrize("part", ["t1", "t2"])
def test_a_core_without_the_other_is_explained(part: str) -> None:
    layer = fl.Conv2d(12, 20, kernel_size=3)
    parts = Loha.for_layer(layer, "a", rank=2, has_cores=True).parts()
    with pytest.raises(ValueError, match=f"its {part} is missing"):
        Loha.from_parts(layer, "a", {name: tensor for name, tensor in parts.items() if name != part})


def test_cores_for_a_linear_layer_are_explained() -> None:
    parts = Loha.for_layer(fl.Conv2d(12, 20, kernel_size=3), "a", rank=2, has_cores=True).parts()
    with pytest.raises(ValueError, match="the cores of a convolution, and the layer is linear"):
        Loha.from_parts(fl.Linear(12, 20), "a", parts)


@pytest.mark.parametrize(("width", "is_weight"), [(80, True), (320, True), (640, False), (1280, False)])
def test_small_layers_run_with_the_whole_weight_and_large_ones_do_not(width: int, is_weight: bool) -> None:
    layer = fl.Linear(width, width, device="meta")
    assert Loha.for_layer(layer, "a", rank=8).runs_as_weight == is_weight
