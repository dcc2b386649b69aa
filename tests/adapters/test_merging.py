"""Merged updates are the same as those that run beside the layer; unmerging gives back the very same bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.adapters import DeltaAdapter, LoraAdapter
from refiners.adapters.difference import Difference
from refiners.adapters.embedding import EmbeddingLora
from refiners.adapters.lora import LinearLora
from refiners.adapters.merging import merge


def random_lora(layer: Any, name: str, rank: int = 3, scale: Any = 0.7) -> LoraAdapter:
    adapter = LoraAdapter(layer, rank=rank, alpha=2.0, scale=scale, name=name)
    nn.init.normal_(adapter.loras[name].up.weight)
    return adapter.inject()


def difference(layer: Any, name: str = "difference") -> DeltaAdapter:
    bias = None if isinstance(layer, nn.Embedding) else torch.randn(layer.weight.shape[0])
    return DeltaAdapter(layer, Difference(name, torch.randn_like(layer.weight), bias, scale=-0.4)).inject()


def embedding_lora(layer: Any) -> DeltaAdapter:
    lora = EmbeddingLora("words", torch.randn(2, layer.num_embeddings), torch.randn(layer.embedding_dim, 2), 0.5, 3.0)
    return DeltaAdapter(layer, lora).inject()


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Tensor]]] = {
    "linear": (lambda: fl.Linear(5, 4), lambda: torch.randn(3, 5)),
    "linear without bias": (lambda: fl.Linear(5, 4, bias=False), lambda: torch.randn(2, 3, 5)),
    "convolution": (lambda: fl.Conv2d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 6, 5)),
    "embedding": (lambda: fl.Embedding(9, 4), lambda: torch.tensor([[1, 8, 0]])),
    "layer norm": (lambda: fl.LayerNorm(5), lambda: torch.randn(3, 5)),
    "group norm": (lambda: fl.GroupNorm(4, 2), lambda: torch.randn(2, 4, 3, 3)),
    "layer norm 2d": (lambda: fl.LayerNorm2d(4), lambda: torch.randn(2, 4, 3, 3)),
}


def adapted(case: str) -> tuple[fl.Chain, list[DeltaAdapter], Tensor]:
    torch.manual_seed(0)
    layer, x = CASES[case][0](), CASES[case][1]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    chain = fl.Chain(layer)
    adapters: list[DeltaAdapter] = [difference(layer)]
    if isinstance(layer, nn.Linear | nn.Conv2d):
        adapters += [random_lora(layer, "one"), random_lora(layer, "two", rank=2)]
    if isinstance(layer, nn.Embedding):
        adapters += [embedding_lora(layer)]
    return chain, adapters, x


def bits(chain: fl.Chain) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in chain.state_dict().items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", CASES)
def test_merged_is_what_ran_beside_and_unmerging_restores_every_bit(case: str) -> None:
    chain, adapters, x = adapted(case)
    before, output, tree = bits(chain), chain(x), repr(chain)
    weight = adapters[0].base.weight
    merged = merge(adapters)
    assert merged.is_merged and not list(chain.layers(DeltaAdapter))
    torch.testing.assert_close(chain(x), output, rtol=1e-4, atol=1e-5)
    merged.unmerge()
    assert not merged.is_merged and adapters[0].base.weight is weight
    assert_same_bits(bits(chain), before)
    assert torch.equal(chain(x), output) and repr(chain) == tree


def test_a_thousand_cycles_change_no_bit() -> None:
    chain, adapters, x = adapted("linear")
    before, output = bits(chain), chain(x)
    for _ in range(1000):
        merge(adapters).unmerge()
    assert_same_bits(bits(chain), before)
    assert torch.equal(chain(x), output)


def test_some_can_be_merged_below_others() -> None:
    chain, adapters, x = adapted("linear")
    output = chain(x)
    merged = merge([adapters[1]])
    torch.testing.assert_close(chain(x), output, rtol=1e-4, atol=1e-5)
    assert len(list(chain.layers(DeltaAdapter, recurse=True))) == 2
    second = merge(adapters[2:])
    with pytest.raises(RuntimeError, match="has changed since it was merged: undo later merges first"):
        merged.unmerge()
    second.unmerge()
    merged.unmerge()
    torch.testing.assert_close(chain(x), output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    chain, adapters, _ = adapted("linear")
    chain.to(dtype)
    layer = adapters[0].base
    exact = layer.weight.detach().double() + sum(
        delta.double().delta_weight(layer.weight.double()) for each in adapters for delta in each.deltas.values()
    )
    for each in adapters:
        each.to(dtype)
    merge(adapters)
    assert (layer.weight.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_a_disabled_update_is_not_merged() -> None:
    chain, adapters, x = adapted("linear")
    layer = adapters[0].base
    for adapter in adapters:
        for delta in adapter.deltas.values():
            delta.is_enabled = False
    torch.testing.assert_close(chain(x), layer(x))
    before = layer.weight.clone()
    merge(adapters)
    assert torch.equal(layer.weight, before)


def test_training_over_a_merge_is_not_overwritten() -> None:
    chain, adapters, _ = adapted("linear")
    merged = merge(adapters)
    with torch.no_grad():
        chain.Linear.weight.add_(1)
    after = bits(chain)
    with pytest.raises(RuntimeError, match="the weight of a Linear has changed"):
        merged.unmerge()
    assert_same_bits(bits(chain), after)


def test_what_cannot_be_merged_is_left_as_it_is() -> None:
    chain, adapters, x = adapted("linear")
    adapters[2].deltas["two"].scale = (1.0, 2.0, 3.0)
    before, output = bits(chain), chain(x)
    with pytest.raises(ValueError, match="a scale for each of 3 samples"):
        merge(adapters)
    adapters[2].deltas["two"].scale = 3e38
    up: Any = adapters[2].deltas["two"].up
    up.weight.data *= 100
    with pytest.raises(ValueError, match=r"the weight of a Linear would not be finite in torch\.float32"):
        merge(adapters)
    adapters[2].deltas["two"].scale = (1.0, 2.0, 3.0)
    up.weight.data.copy_(before["Linear.LoraAdapter_2.LinearLora.up.weight"])
    assert_same_bits(bits(chain), before)
    assert torch.equal(chain(x), output)
    waiting = LoraAdapter(fl.Linear(2, 2))
    with pytest.raises(RuntimeError, match="LoraAdapter is not injected"):
        merge([waiting])


def test_unmerging_twice_is_an_error() -> None:
    _, adapters, _ = adapted("linear")
    merged = merge(adapters)
    merged.unmerge()
    with pytest.raises(RuntimeError, match="not merged"):
        merged.unmerge()


# -- scales for each sample


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("times", [1, 2])
def test_a_scale_for_each_sample_is_that_sample_alone_with_its_scale(case: str, times: int) -> None:
    chain, adapters, x = adapted(case)
    x = torch.cat([x[:1]] * 3 * times)
    scales = (0.0, -0.5, 1.5)
    expected: list[Tensor] = []
    for index in range(3 * times):
        for adapter in adapters:
            adapter.scale = scales[index % 3]
        expected.append(chain(x[index : index + 1]))
    for adapter in adapters:
        adapter.scale = scales
        assert adapter.scale == scales
    torch.testing.assert_close(chain(x), torch.cat(expected), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"scales for 3 samples, but the batch has 4"):
        chain(torch.cat([x[:1]] * 4))


def test_one_scale_and_scales_for_each_sample_run_together() -> None:
    chain, adapters, x = adapted("linear")
    adapters[1].scale = (0.5, 1.0, 2.0)
    (one,), (two,) = adapters[1].deltas.values(), adapters[2].deltas.values()
    assert isinstance(one, LinearLora) and isinstance(two, LinearLora)
    layer = adapters[0].base
    rest = chain.Linear.base(x) + adapters[0].deltas["difference"].update(x, layer(x), layer)
    torch.testing.assert_close(chain(x), rest + one(x) + two(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [(), (1.0, float("nan")), float("inf")])
def test_impossible_scales_are_refused_and_change_nothing(scale: Any) -> None:
    _, adapters, _ = adapted("linear")
    with pytest.raises(ValueError, match="scale"):
        adapters[1].scale = scale
    assert adapters[1].scale == 0.7
