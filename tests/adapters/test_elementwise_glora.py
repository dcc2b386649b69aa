"""Elementwise GLoRAs compute what peft's compute; outputs and the gradients of every tensor."""

import warnings
from typing import Any

import pytest
import torch
from delta_forms import updated
from delta_specimens import as_torch, assert_close, assert_same_as, with_deltas, with_values

import refiners.fluxion.layers as fl
from refiners.adapters import DeltaAdapter
from refiners.adapters.elementwise_glora import ElementwiseGlora
from refiners.adapters.merging import merge

with warnings.catch_warnings():  # what others deprecate is not ours to fix
    warnings.simplefilter("ignore")
    from peft import GloraConfig
    from peft.tuners.glora.layer import GloraLinear

# Whether the layer has a bias, and peft's settings.
SETTINGS: dict[str, tuple[bool, dict[str, Any]]] = {
    "products": (True, {"r": 3}),
    "products, no bias": (False, {"r": 3}),
    "vectors": (True, {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
    "vectors, no bias": (False, {"config_A_B": "vector"}),
    "numbers": (True, {"config_A_B": "constant", "config_C": "none"}),
    "numbers, no bias": (False, {"config_A_B": "constant"}),
    "of the bias alone": (True, {"r": 2, "config_A_B": "none"}),
    "of the weight alone": (True, {"r": 2, "config_C": "none", "config_D_E": "none"}),
}


def random_glora(layer: Any, scale: float = 1.0) -> ElementwiseGlora:
    glora = ElementwiseGlora.for_layer(layer, "a", rank=3, scale=scale)
    with_values(glora.parts().values(), seed=2)
    return glora


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_elementwise_glora_computes_what_peft_computes(settings: str) -> None:
    torch.manual_seed(0)
    has_bias, options = SETTINGS[settings]
    layer, x = fl.Linear(12, 20, bias=has_bias), torch.randn(2, 5, 12)
    theirs = GloraLinear(as_torch(layer), "default", GloraConfig(**options))
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in theirs.named_parameters():
        if name.startswith("glora_"):
            path, _, form = name.removeprefix("glora_").split(".")
            weights[f"{path}_{form}"] = tensor
    with_values(weights.values(), seed=1)
    parts = {part: tensor.detach().clone() for part, tensor in weights.items()}
    assert_same_as(theirs, weights, layer, ElementwiseGlora.from_parts(layer, "a", parts), x)


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_scale_counts_for_the_weight_and_the_bias(has_bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = fl.Linear(12, 20, bias=has_bias), torch.randn(4, 12)
    start = ElementwiseGlora.for_layer(layer, "a")
    assert_close(with_deltas(layer, start)(x), layer(x))
    glora = random_glora(layer, scale=0.5)
    assert_close(with_deltas(layer, glora)(x), updated(layer, x, glora))
    difference = updated(layer, x, glora) - layer(x)
    assert difference.norm() > 0.1 * layer(x).norm()
    glora.scale = [0.0, 1.0]
    assert_close(with_deltas(layer, glora)(x) - layer(x), difference * torch.tensor([0.0, 2, 0, 2])[:, None])


def test_it_stacks_and_merges_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    chain, x = fl.Chain(fl.Linear(12, 20)), torch.randn(4, 12)
    layer = chain.layer(0, fl.Linear)
    before, gloras = chain(x), (random_glora(layer, 0.5), random_glora(layer, -0.3))
    gloras[1].name = "b"
    adapter = DeltaAdapter(layer, *gloras).inject(chain)
    adapted = chain(x)
    assert_close(adapted, updated(layer, x, *gloras))
    merged = merge([adapter])
    assert_close(chain(x), adapted)
    merged.unmerge()
    adapter.eject()
    assert torch.equal(chain(x), before)


@pytest.mark.parametrize(
    ("layer", "shapes", "message"),
    [
        (fl.Linear(12, 20), {}, "it has no parts"),
        (fl.Linear(12, 20), {"A_Xd": (20, 2)}, r"its A_Xd \(20, 2\) make up no A for a weight of \(20, 12\)"),
        (fl.Linear(12, 20), {"B_Xd": (20, 2), "B_Xu": (3, 12)}, "make up no B"),
        (fl.Linear(12, 20), {"A_X": (12, 1)}, "make up no A"),
        (fl.Linear(12, 20), {"D_Xd": (20, 2), "D_Xu": (2, 1)}, "make up no D"),
        (fl.Linear(12, 20), {"C_Xd": (12, 2), "C_Xu": (2, 1), "C_X": (12, 1)}, "make up no C"),
        (fl.Linear(12, 20), {"F_X": (1,)}, "it has a part 'F_X'"),
        (fl.Linear(12, 20, bias=False), {"A_X": (1,), "E_X": (1,)}, "it has E_X, which changes the bias, and"),
        (fl.Conv2d(12, 20, 1), {"A_X": (1,)}, "it updates a linear layer, not a convolution"),
    ],
)
def test_parts_that_do_not_fit_are_refused(layer: Any, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ElementwiseGlora.from_parts(layer, "a", {part: torch.ones(shape) for part, shape in shapes.items()})
    with pytest.raises(ValueError, match="rank of a weight update must be at least 1, not 0"):
        ElementwiseGlora.for_layer(fl.Linear(12, 20), "a", rank=0)
