"""GLoRAs compute what LyCORIS' compute; outputs and the gradients of every tensor."""

import warnings

import pytest
import torch
from delta_specimens import LAYERS, as_torch, assert_close, assert_same_as, with_deltas, with_values

import refiners.fluxion.layers as fl
from refiners.adapters.glora import Glora

with warnings.catch_warnings():  # what others deprecate is not ours to fix
    warnings.simplefilter("ignore")
    from lycoris.modules.glora import GLoRAModule, _glora_weight


@pytest.fixture(params=[0.0, float("inf")], ids=["as weight", "through factors"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Glora, "largest_share", request.param)


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (3, 1.7)])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_glora_computes_what_lycoris_computes(kind: str, rank: int, alpha: float) -> None:
    torch.manual_seed(rank)
    layer, x = LAYERS[kind][0](), torch.randn(LAYERS[kind][1])
    theirs = GLoRAModule("a", as_torch(layer), lora_dim=rank, alpha=alpha)
    weights = {part.removesuffix(".weight"): tensor for part, tensor in theirs.named_parameters()}
    with_values(weights.values(), seed=1)
    parts = {part: tensor.detach().clone() for part, tensor in weights.items()}
    assert_same_as(theirs, weights, layer, Glora.from_parts(layer, "a", parts, alpha), x)


def test_the_core_of_a_tucker_decomposition_counts_as_in_lycoris() -> None:
    torch.manual_seed(0)
    layer, x = fl.Conv2d(12, 20, kernel_size=3, padding=1), torch.randn(2, 12, 5, 4)
    shapes = {"a1": (12, 2, 1, 1), "a2": (2, 12, 1, 1), "b1": (20, 2, 1, 1), "b2": (2, 12, 1, 1), "bm": (2, 2, 3, 3)}
    parts = {part: torch.randn(shape) for part, shape in shapes.items()}
    glora = Glora.from_parts(layer, "a", parts, 0.5)
    expected = _glora_weight(layer.weight, *parts.values(), 0.25)
    assert_close(glora.delta_weight(layer.weight), expected)
    assert_close(with_deltas(layer, glora)(x), layer(x) + torch.conv2d(x, expected, padding=1))
    with pytest.raises(ValueError, match="it has the core of a convolution, and the layer is linear"):
        Glora.from_parts(fl.Linear(12, 20), "a", parts)
