"""The parts of LoHas and LoKrs: taken and given back as they are, checked against the layer, new ones for training."""

from typing import Any

import pytest
import torch
from delta_forms import FACTORED, layer_and_input, made, start_of
from delta_specimens import assert_close
from torch import nn

import refiners.fluxion.layers as fl
from refiners.adapters import DeltaAdapter
from refiners.adapters.loha import Loha
from refiners.adapters.lokr import Lokr

each_form = pytest.mark.parametrize("form", [f"{form}, as weight" for form in FACTORED])
each_kind = pytest.mark.parametrize("kind", ["linear", "conv 1x1", "conv 3x3"])


@each_form
def test_a_new_update_is_placed_like_the_layer_or_as_told(form: str) -> None:
    layer, _ = layer_and_input("conv 3x3")
    layer.to(torch.bfloat16)
    assert start_of(form, layer).dtype == torch.bfloat16
    assert start_of(form, layer, dtype=torch.float32).dtype == torch.float32
    assert start_of(form, layer, device="meta").device.type == "meta"


@each_form
def test_an_update_of_another_layer_is_explained(form: str) -> None:
    layer, _ = layer_and_input("conv 3x3")
    delta = made(form, layer)
    with pytest.raises(ValueError, match=r"weights of shape \(20, 12, 3, 3\), that of the layer has \(20, 12, 1, 1\)"):
        DeltaAdapter(layer_and_input("conv 1x1")[0], delta)
    with pytest.raises(ValueError, match="a linear layer or a convolution, not a LayerNorm"):
        DeltaAdapter(fl.LayerNorm(12), delta)
    with pytest.raises(ValueError, match="a linear layer or a convolution, not a Embedding"):
        type(delta).from_parts(nn.Embedding(12, 20), "a", delta.parts())


@each_form
@each_kind
def test_every_part_is_checked_against_the_layer(form: str, kind: str) -> None:
    layer, _ = layer_and_input(kind)
    whole = made(form, layer)
    for part, tensor in whole.parts().items():
        less = {other: value for other, value in whole.parts().items() if other != part}
        for broken in (less, less | {part: tensor[:-1]}, less | {part: tensor[0, 0]}, less | {part: tensor[..., None]}):
            with pytest.raises(ValueError, match=f"{whole.kind} 'a' does not fit: its? .*"):
                type(whole).from_parts(layer, "a", broken)


@each_form
def test_unknown_parts_are_refused(form: str) -> None:
    layer, _ = layer_and_input("conv 3x3")
    delta = made(form, layer)
    with pytest.raises(ValueError, match=r"it has a part 'up', and there are: w1"):
        type(delta).from_parts(layer, "a", delta.parts() | {"up": torch.ones(1)})


@pytest.mark.parametrize("cls", [Loha, Lokr])
def test_a_new_update_needs_a_rank(cls: Any) -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        cls.for_layer(fl.Linear(3, 4), "a", rank=0)


@each_form
def test_a_saved_state_brings_its_alpha(form: str) -> None:
    layer, _ = layer_and_input("conv 3x3")
    delta, other = made(form, layer), made(form, layer, seed=1)
    other.alpha.fill_(9.0)
    delta.load_state_dict(other.state_dict())
    assert_close(delta.delta_weight(layer.weight), delta.direction(layer.weight) * delta.gain)
    assert delta.gain == (1.0 if form.startswith("LoKr of whole matrices") else 9.0 / delta.rank)
