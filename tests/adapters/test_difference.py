"""Whole weights in the place of a layer's own, and magnitudes of the entries of an embedding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from delta_specimens import with_deltas
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.adapters.deltas import make_delta
from refiners.adapters.difference import Replacement
from refiners.adapters.merging import merge
from refiners.weights.lora_keys import Kind

LAYERS: dict[str, tuple[Callable[[], Any], Callable[[], Tensor]]] = {
    "linear": (lambda: fl.Linear(6, 4), lambda: torch.randn(3, 6)),
    "linear without a bias": (lambda: fl.Linear(6, 4, bias=False), lambda: torch.randn(3, 6)),
    "convolution": (lambda: fl.Conv2d(3, 4, 3, padding=1), lambda: torch.randn(2, 3, 5, 5)),
    "norm": (lambda: fl.LayerNorm(6), lambda: torch.randn(3, 6)),
    "embedding": (lambda: fl.Embedding(9, 6), lambda: torch.randint(9, (3, 4))),
}


def close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_whole_weight_stands_in_the_place_of_the_layers_own(kind: str) -> None:
    make, draw = LAYERS[kind]
    torch.manual_seed(0)
    layer, other, x = make(), make(), draw()
    with torch.no_grad():
        for parameter in (*layer.parameters(), *other.parameters()):
            parameter.copy_(torch.randn(parameter.shape))
    before, wanted = layer(x), other(x)
    delta = make_delta(layer, "a", Kind.WHOLE, dict(other.named_parameters()))
    assert isinstance(delta, Replacement)
    chain: Any = with_deltas(layer, delta)
    assert close(chain(x), wanted) and not close(wanted, before)
    delta.scale = 0.25
    assert close(chain(x), 0.75 * before + 0.25 * wanted)
    delta.scale = 1.0
    adapter = chain[0]
    merged = merge([adapter])
    assert close(layer(x), wanted)
    merged.unmerge()
    adapter.eject()
    assert torch.equal(layer(x), before)


def test_a_bias_alone_may_be_replaced_and_may_be_new() -> None:
    torch.manual_seed(0)
    bias, x = torch.randn(4), torch.randn(3, 6)
    for has_bias in (True, False):
        layer = fl.Linear(6, 4, bias=has_bias)
        chain: Any = with_deltas(layer, Replacement("a", None, bias))
        assert close(chain(x), x @ layer.weight.T + bias)


def test_a_dora_of_an_embedding_has_a_magnitude_for_each_entry() -> None:
    torch.manual_seed(0)
    layer, ids = fl.Embedding(9, 6), torch.randint(9, (3, 4))
    parts = {"down": torch.randn(2, 9), "up": torch.randn(6, 2), "magnitude": torch.rand(1, 6) + 0.5}
    delta = make_delta(layer, "a", Kind.EMBEDDING, parts, alpha=1.0)
    moved = layer.weight + 0.5 * (parts["up"] @ parts["down"]).T
    expected = parts["magnitude"] * moved / moved.norm(dim=0, keepdim=True)
    assert close(with_deltas(layer, delta)(ids), expected[ids])
    for wrong in (torch.ones(9, 1), torch.ones(1, 9), torch.ones(6)):
        with pytest.raises(ValueError, match=r"for an embedding of 6 entries it should be \(1, 6\)"):
            make_delta(layer, "a", Kind.EMBEDDING, parts | {"magnitude": wrong})
