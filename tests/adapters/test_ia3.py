"""(IA)^3 computes what LyCORIS' and peft's compute; outputs and the gradients of every tensor."""

import copy
import warnings
from typing import Any

import pytest
import torch
from delta_specimens import LAYERS, as_torch, assert_close, assert_same_as, peft_on, with_deltas, with_values
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.adapters.deltas import make_delta
from refiners.adapters.ia3 import Ia3
from refiners.adapters.merging import merge
from refiners.weights.lora_keys.kinds import Kind

with warnings.catch_warnings():  # what others deprecate is not ours to fix
    warnings.simplefilter("ignore")
    from lycoris.modules.ia3 import IA3Module
    from peft import IA3Config


def ia3_of(layer: Any, parts: dict[str, Tensor]) -> Any:
    return make_delta(layer, "a", Kind.IA3, {part: tensor.detach().clone() for part, tensor in parts.items()})


@pytest.mark.parametrize("is_on_input", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_ia3_computes_what_lycoris_computes(kind: str, is_on_input: bool) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[kind][0](), torch.randn(LAYERS[kind][1])
    theirs = IA3Module("a", as_torch(layer), train_on_input=is_on_input)
    with_values([theirs.weight], seed=1)
    delta = ia3_of(layer, {"weight": theirs.weight, "on_input": theirs.on_input})
    delta.on_input = None  # what is left is what has gradients
    assert_same_as(theirs, {"weight": theirs.weight}, layer, delta, x)


@pytest.mark.parametrize("is_on_input", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_ia3_computes_what_peft_computes_and_merges(kind: str, is_on_input: bool) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[kind][0](), torch.randn(LAYERS[kind][1])
    config = IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if is_on_input else [])
    theirs, tensors = peft_on(layer, config)
    delta = ia3_of(layer, {"l": tensors["ia3_l"]})
    assert_same_as(theirs, {"l": tensors["ia3_l"]}, layer, delta, x)
    chain = with_deltas(copy.deepcopy(layer), delta)
    merge([chain[0]])
    assert_close(chain(x), theirs(x))


def test_what_counts_is_which_side_the_file_names() -> None:
    layer, values = fl.Linear(4, 4), torch.randn(4)
    for side, expected in ((0, values[:, None] * layer.weight), (1, values * layer.weight)):
        for dtype in (torch.int64, torch.float16):
            delta = ia3_of(layer, {"weight": values, "on_input": torch.tensor(side, dtype=dtype)})
            assert_close(delta.delta_weight(layer.weight), expected)


def test_numbers_that_fit_neither_side_are_explained() -> None:
    layer = fl.Linear(4, 6)
    parts = {"weight": torch.ones(4), "on_input": torch.tensor(0)}
    with pytest.raises(ValueError, match=r"shape \(4,\) with on_input 0, for a weight of \(6, 4\)"):
        Ia3.from_parts(layer, "a", parts)
    with pytest.raises(ValueError, match="either a weight or an l"):
        Ia3.from_parts(layer, "a", parts | {"l": torch.ones(6, 1)})
