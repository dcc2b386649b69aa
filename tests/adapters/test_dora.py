"""DoRAs compute what LyCORIS' and peft's compute; outputs and the gradients of every tensor."""

import warnings
from typing import Any

import pytest
import torch
from delta_specimens import LAYERS, as_torch, assert_close, assert_same_as, peft_on, with_deltas, with_values
from torch import nn

import refiners.fluxion.layers as fl
from refiners.adapters.deltas import make_delta
from refiners.adapters.dora import Dora
from refiners.weights.lora_keys.kinds import Kind

with warnings.catch_warnings():  # what others deprecate is not ours to fix
    warnings.simplefilter("ignore")
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule
    from peft import LoraConfig

NAMES = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid", "dora_scale": "magnitude"}
MODULES: dict[Kind, type[Any]] = {Kind.LORA: LoConModule, Kind.LOHA: LohaModule, Kind.LOKR: LokrModule}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("has_core", [False, True], ids=["", "Tucker"])
@pytest.mark.parametrize("is_of_rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("layer_kind", LAYERS)
def test_a_dora_of_any_kind_computes_what_lycoris_computes(
    kind: Kind, has_core: bool, is_of_rows: bool, layer_kind: str
) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[layer_kind][0](), torch.randn(LAYERS[layer_kind][1])
    settings = {"lora_dim": 2, "alpha": 1.7, "use_tucker": has_core, "weight_decompose": True, "wd_on_out": is_of_rows}
    theirs = MODULES[kind]("a", as_torch(layer), **settings)
    with_values(theirs.parameters(), seed=1)
    weights = {
        NAMES.get(name, name.removeprefix("hada_").removeprefix("lokr_")): tensor
        for name, tensor in theirs.named_parameters()
    }
    parts = {part: tensor.detach().clone() for part, tensor in weights.items()}
    delta = make_delta(layer, "a", kind, parts, 1.7)
    assert isinstance(delta, Dora)
    delta.is_norm_constant = False
    assert_same_as(theirs, weights, layer, delta, x)


@pytest.mark.parametrize("layer_kind", [kind for kind in LAYERS if kind != "uneven"])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (3, 1.7)])
def test_a_dora_computes_what_peft_computes(layer_kind: str, rank: int, alpha: float) -> None:
    torch.manual_seed(rank)
    layer, x = LAYERS[layer_kind][0](), torch.randn(LAYERS[layer_kind][1])
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"], use_dora=True)  # pyright: ignore[reportArgumentType]
    theirs, tensors = peft_on(layer, config)
    names = {"lora_A.default.weight": "down", "lora_B.default.weight": "up"}
    weights = {names.get(name, "magnitude"): tensor for name, tensor in tensors.items()}
    parts = {part: tensor.detach().clone() for part, tensor in weights.items()}
    if layer.weight.ndim == 4:  # where peft's is (1, out, 1, 1): let it use a view of ours
        parts["magnitude"] = parts["magnitude"].transpose(0, 1)
        weights["magnitude"] = parts["magnitude"].clone().requires_grad_()
        holder: Any = theirs
        del holder.lora_magnitude_vector["default"].weight
        holder.lora_magnitude_vector["default"].weight = weights["magnitude"].transpose(0, 1)
    assert_same_as(theirs, weights, layer, make_delta(layer, "a", Kind.DORA, parts, alpha), x)


@pytest.mark.parametrize("layer_kind", ["linear", "conv 3x3"])
def test_the_lengths_of_rows_need_no_product_of_the_factors(layer_kind: str) -> None:
    layer = LAYERS[layer_kind][0]()
    dora = Dora.for_layer(layer, "a", rank=3, alpha=1.7)
    with_values(dora.parameters(), seed=0)
    moved = dora.inner.delta_weight(layer.weight)
    assert_close(dora._norms(layer.weight, None), dora._norms(layer.weight, moved))


def test_rows_that_the_update_takes_away_stay_finite() -> None:
    layer, x = fl.Linear(4, 3, bias=False), torch.randn(2, 4)
    nn.init.zeros_(layer.weight[0].detach())
    dora = Dora.for_layer(layer, "a", rank=1)
    assert torch.equal(with_deltas(layer, dora)(x), layer(x))
    with torch.no_grad():
        dora.magnitude.fill_(1.0)
        layer.weight[1] = dora.inner.parts()["down"][0]
        dora.inner.parts()["up"][1] = -1.0
    assert with_deltas(layer, dora)(x).isfinite().all()


def test_the_strength_is_the_doras_own() -> None:
    layer = fl.Linear(4, 3)
    dora = Dora.for_layer(layer, "a", rank=1, scale=0.5)
    assert dora.scale == 0.5 and dora.inner.scale == 1.0
    dora.inner.scale = 0.3
    with pytest.raises(ValueError, match=r"the update in it has scale 0.3, set that of the DoRA"):
        Dora(dora.inner, dora.magnitude)


def test_a_magnitude_of_neither_side_is_explained() -> None:
    layer = fl.Linear(4, 3)
    parts = Dora.for_layer(layer, "a", rank=1).parts() | {"magnitude": torch.ones(4)}
    with pytest.raises(ValueError, match=r"magnitude has shape \(4,\), which is none for 3 outputs or for 4 inputs"):
        Dora.from_parts(layer, "a", parts)
