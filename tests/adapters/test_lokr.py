"""LoKrs compute what LyCORIS' and peft's compute; outputs and the gradients of every tensor."""

import re
import warnings
from typing import Any

import pytest
import torch
from delta_specimens import LAYERS, as_torch, assert_close, assert_same_as, peft_on, with_values

import refiners.fluxion.layers as fl
from refiners.adapters.lokr import Lokr

with warnings.catch_warnings():  # what others deprecate is not ours to fix
    warnings.simplefilter("ignore")
    from lycoris.modules.lokr import LokrModule
    from peft import LoKrConfig

# Of layers of 12 inputs and 20 outputs: what both of LyCORIS and peft are told, and which parts that makes.
FORMS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "whole": ({"rank": 3}, {"w1", "w2"}),
    "product": ({"rank": 2}, {"w1", "w2_a", "w2_b"}),
    "rank 1": ({"rank": 1}, {"w1", "w2_a", "w2_b"}),
    "small first": ({"rank": 2, "factor": 2}, {"w1", "w2_a", "w2_b"}),
    "two products": ({"rank": 1, "decompose_both": True}, {"w1_a", "w1_b", "w2_a", "w2_b"}),
    "Tucker": ({"rank": 2, "use_tucker": True}, {"w1", "w2_a", "w2_b", "t2"}),
    "product and Tucker": (
        {"rank": 1, "decompose_both": True, "use_tucker": True},
        {"w1_a", "w1_b", "w2_a", "w2_b", "t2"},
    ),
}
each_form = pytest.mark.parametrize("form", FORMS)


def lokr_of(layer: Any, weights: dict[str, torch.Tensor], alpha: float) -> Lokr:
    return Lokr.from_parts(layer, "a", {part: tensor.detach().clone() for part, tensor in weights.items()}, alpha)


@pytest.mark.usefixtures("way")
@each_form
@pytest.mark.parametrize("alpha", [1.0, 2.6])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_lokr_computes_what_lycoris_computes(kind: str, form: str, alpha: float) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[kind][0](), torch.randn(LAYERS[kind][1])
    settings, parts = FORMS[form]
    others = {name: value for name, value in settings.items() if name != "rank"}
    theirs = LokrModule("a", as_torch(layer), lora_dim=settings["rank"], alpha=alpha, **others)
    weights = {part.removeprefix("lokr_"): tensor for part, tensor in theirs.named_parameters()}
    assert weights.keys() == parts - ({"t2"} if layer.weight.shape[2:].numel() == 1 else set())
    with_values(weights.values(), seed=1)
    assert_same_as(theirs, weights, layer, lokr_of(layer, weights, alpha), x)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("form", [form for form in FORMS if form != "whole"])
@pytest.mark.parametrize("kind", ["linear", "conv 1x1", "conv 3x3", "stride 2"])
def test_a_lokr_computes_what_peft_computes(kind: str, form: str) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[kind][0](), torch.randn(LAYERS[kind][1])
    settings, _ = FORMS[form]
    config = LoKrConfig(
        r=settings["rank"],
        alpha=5,
        target_modules=["layer"],
        decompose_factor=settings.get("factor", -1),
        decompose_both=settings.get("decompose_both", False),
        use_effective_conv2d=settings.get("use_tucker", False),
    )
    theirs, tensors = peft_on(layer, config)
    weights = {part.removeprefix("lokr_"): tensor for part, tensor in tensors.items()}
    assert_same_as(theirs, weights, layer, lokr_of(layer, weights, 5.0), x)


def test_whole_matrices_have_no_use_for_alpha() -> None:
    layer = fl.Linear(12, 20)
    parts = {"w1": torch.randn(4, 3), "w2": torch.randn(5, 4)}
    delta = Lokr.from_parts(layer, "a", parts, alpha=0.1, scale=0.5)
    assert_close(delta.delta_weight(layer.weight), 0.5 * torch.kron(parts["w1"], parts["w2"]))
    assert delta.alpha == torch.tensor(0.1)


@pytest.mark.parametrize("kind", ["linear", "conv 1x1"])
@pytest.mark.parametrize("kernel", [(), (1, 1)])
def test_a_whole_matrix_without_extent_fits_linear_layers_and_convolutions(kind: str, kernel: tuple[int, ...]) -> None:
    layer, x = LAYERS[kind][0](), torch.randn(LAYERS[kind][1])
    parts = {"w1": torch.randn(4, 3), "w2": torch.randn(5, 4, *kernel)}
    delta = Lokr.from_parts(layer, "a", parts)
    whole = torch.kron(parts["w1"], parts["w2"].flatten(1)).view_as(layer.weight)
    assert_close(delta.delta_weight(layer.weight), whole)
    expected = torch.func.functional_call(layer, {"weight": layer.weight + whole}, (x,))
    assert_close(layer(x) + delta.update(x, layer(x), layer), expected)
    assert delta.parts()["w2"].shape == parts["w2"].shape


MISFITS = {
    "its first matrix is 7 by 3, which do not divide the 20 and 12": {"w1": (7, 3), "w2": (5, 4)},
    "it has both w1 and w1_b": {"w1": (4, 3), "w1_b": (1, 3), "w2": (5, 4)},
    "it has both w2 and t2": {"w1": (4, 3), "w2": (5, 4), "t2": (1, 1, 3, 3)},
    "it has neither w2 nor both of w2_a and w2_b": {"w1": (4, 3), "w2_a": (5, 1)},
    "its w2 has shape (4, 5), for a weight of (20, 12) it should be (5, 4)": {"w1": (4, 3), "w2": (4, 5)},
    "its w1_a has shape (4, 2), for a weight of (20, 12) it should be (4, 1)": {
        **{"w1_a": (4, 2), "w1_b": (1, 3)},
        "w2": (5, 4),
    },
    "its w1 is no matrix": {"w1": (4,), "w2": (5, 4)},
    "the core of a convolution": {"w1": (4, 3), "w2_a": (1, 5), "w2_b": (1, 4), "t2": (1, 1, 3, 3)},
}


@pytest.mark.parametrize("reason", MISFITS)
def test_parts_that_do_not_belong_together_are_explained(reason: str) -> None:
    parts = {part: torch.ones(shape) for part, shape in MISFITS[reason].items()}
    with pytest.raises(ValueError, match=re.escape(reason)):
        Lokr.from_parts(fl.Linear(12, 20), "a", parts)


@pytest.mark.parametrize(
    ("factor", "first", "second"), [(None, (16, 24), (20, 32)), (8, (8, 8), (40, 96)), (7, (5, 6), (64, 128))]
)
def test_a_new_lokr_has_the_largest_first_matrix_that_is_allowed(
    factor: int | None, first: tuple[int, int], second: tuple[int, int]
) -> None:
    parts = Lokr.for_layer(fl.Linear(768, 320), "a", rank=4, factor=factor).parts()
    assert parts["w1"].shape == first
    assert (parts["w2_a"].shape, parts["w2_b"].shape) == ((second[0], 4), (4, second[1]))


def test_a_new_lokr_needs_a_factor_of_one_at_least() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        Lokr.for_layer(fl.Linear(12, 20), "a", factor=0)


@pytest.mark.parametrize(("width", "is_weight"), [(80, True), (160, True), (320, False), (1280, False)])
def test_small_layers_run_with_the_whole_weight_and_large_ones_do_not(width: int, is_weight: bool) -> None:
    layer = fl.Linear(width, width, device="meta")
    assert Lokr.for_layer(layer, "a", rank=8).runs_as_weight == is_weight
