"""What every kind of weight update promises, in every form and every way to run."""

from typing import Any

import pytest
import torch
from delta_forms import FORMS, layer_and_input, made, start_of, trained, updated
from delta_specimens import ALL_LAYERS, BATCH, assert_close, gradients, with_deltas, with_values
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.adapters import Delta, DeltaAdapter, LoraAdapter
from refiners.adapters.delta import RankedDelta
from refiners.adapters.deltas import kind_of_parts, make_delta
from refiners.adapters.dora import Dora

each_form = pytest.mark.parametrize("form", FORMS)
each_kind = pytest.mark.parametrize("kind", ["linear", "conv 1x1", "conv 3x3"])


def remade(layer: Any, delta: Delta, parts: dict[str, Tensor]) -> Delta:
    ranked = delta.inner if isinstance(delta, Dora) else delta
    alpha = ranked.alpha.item() if isinstance(ranked, RankedDelta) else None
    return make_delta(layer, "a", kind_of_parts(delta), parts, alpha)


@each_form
@pytest.mark.parametrize("kind", ALL_LAYERS)
def test_an_update_equals_the_layer_with_the_updated_weight(form: str, kind: str) -> None:
    layer, x = layer_and_input(kind)
    delta = made(form, layer, scale=-0.7)
    whole, slopes = gradients(lambda x: updated(layer, x, delta), x, trained(delta).values())
    fast, others = gradients(with_deltas(layer, delta), x, trained(delta).values())
    assert_close(fast, whole)
    for slope, other in zip(slopes, others, strict=True):
        assert_close(slope, other)
    assert_close(layer(x) + delta.update(x, layer(x), layer), whole)


@each_form
@each_kind
def test_one_sample_without_a_batch_runs_as_well(form: str, kind: str) -> None:
    layer, x = layer_and_input(kind)
    delta = made(form, layer)
    assert_close(with_deltas(layer, delta)(x[0]), updated(layer, x, delta)[0])


@each_form
@each_kind
def test_updates_of_several_kinds_add_up(form: str, kind: str) -> None:
    layer, x = layer_and_input(kind)
    one, other, third = made(form, layer, "one"), made(form, layer, "other", 0.3, seed=1), made("DoRA", layer, "third")
    chain = with_deltas(layer, one, other, third)
    lora = LoraAdapter(chain[0], rank=2, name="lora").inject().loras["lora"]
    with_values([lora.up.weight], seed=3)
    assert_close(chain(x), updated(layer, x, one, other, third) + lora.update(x, x, layer))


@each_form
@each_kind
def test_each_sample_may_have_its_own_scale(form: str, kind: str) -> None:
    layer, x = layer_and_input(kind)
    delta = made(form, layer, scale=(0.0, 0.5, 1.0))
    chain = with_deltas(layer, delta)
    together = chain(x)
    for index in range(BATCH):
        delta.scale = (0.0, 0.5, 1.0)[index % 3]
        assert_close(together[index], chain(x)[index])


@each_form
@each_kind
def test_parts_may_lie_in_memory_in_any_order_and_a_batch_may_be_empty(form: str, kind: str) -> None:
    layer, x = layer_and_input(kind)
    delta = made(form, layer)
    parts = {part: tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor for part, tensor in delta.parts().items()}
    chain = with_deltas(layer, remade(layer, delta, parts))
    expected = updated(layer, x, delta)
    assert_close(chain(x), expected)
    assert chain(x[:0]).shape == expected[:0].shape


@each_form
@each_kind
def test_scale_zero_is_the_layer_itself(form: str, kind: str) -> None:
    layer, x = layer_and_input(kind)
    assert torch.equal(with_deltas(layer, made(form, layer, scale=0.0))(x), layer(x))


@each_form
@each_kind
def test_ejecting_restores_every_bit(form: str, kind: str) -> None:
    layer, x = layer_and_input(kind)
    before, weight = layer(x), layer.weight.clone()
    chain = with_deltas(layer, made(form, layer))
    assert not torch.equal(chain(x), before)
    chain[0].eject()
    assert torch.equal(chain(x), before) and torch.equal(layer.weight, weight)


@each_form
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parts_come_back_bit_for_bit(form: str, kind: str, dtype: torch.dtype) -> None:
    layer, _ = layer_and_input(kind)
    first = made(form, layer, dtype=dtype)
    parts = {part: tensor.detach() for part, tensor in first.parts().items()}
    again = remade(layer, first, parts)
    assert again.parts().keys() == parts.keys() and type(again) is type(first)
    for part, tensor in again.parts().items():
        assert tensor.data_ptr() == parts[part].data_ptr() and tensor.dtype == parts[part].dtype
    assert_close(again.delta_weight(layer.weight), first.delta_weight(layer.weight))


@each_form
def test_parts_may_lie_on_the_meta_device(form: str) -> None:
    layer, _ = layer_and_input("conv 3x3")
    delta = made(form, layer)
    again = remade(layer, delta, {part: tensor.to("meta") for part, tensor in delta.parts().items()})
    assert all(tensor.is_meta for tensor in again.parts().values())


@each_form
@pytest.mark.parametrize("kind", ["linear", "conv 3x3"])
@pytest.mark.parametrize(
    ("base", "parts"),
    [
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_formats_may_be_mixed(form: str, kind: str, base: torch.dtype, parts: torch.dtype) -> None:
    layer, x = layer_and_input(kind)
    layer.to(base)
    delta = made(form, layer, dtype=parts)
    output = with_deltas(layer, delta)(x.to(base))
    layer.float()
    delta.to(torch.float32)
    assert output.dtype == base
    assert_close(output.float(), updated(layer, x.to(base).float(), delta), tolerance=torch.finfo(base).eps * 8)


@each_form
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_it_runs_under_autocast(form: str, base: torch.dtype) -> None:
    layer, x = layer_and_input("conv 3x3")
    delta = made(form, layer)
    expected = updated(layer, x, delta)
    layer.to(base)
    with torch.autocast("cpu", torch.bfloat16):
        output = with_deltas(layer, delta)(x)
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), expected, tolerance=5e-2)


@each_form
@each_kind
def test_training_starts_at_the_layer_and_moves_with_the_first_step(form: str, kind: str) -> None:
    layer, x = layer_and_input(kind)
    layer.requires_grad_(False)
    delta = start_of(form, layer)
    chain = with_deltas(layer, delta)
    before = layer(x)
    torch.testing.assert_close(chain(x), before, rtol=0, atol=2e-7 if form == "DoRA of columns" else 0)
    (chain(x) - before - 1).square().sum().backward()
    torch.optim.SGD(delta.parameters(), lr=0.01).step()
    assert (chain(x) - before).abs().max() > 1e-4


@each_form
def test_an_update_of_another_layer_is_explained(form: str) -> None:
    delta = made(form, layer_and_input("conv 3x3")[0])
    with pytest.raises(
        ValueError, match=f"{delta.kind.replace('(', '.').replace(')', '.').replace('^', '.')} 'a' does"
    ):
        DeltaAdapter(fl.Conv2d(12, 40, 3), delta)
    with pytest.raises(ValueError, match="a linear layer or a convolution, not a LayerNorm"):
        DeltaAdapter(fl.LayerNorm(12), delta)


@each_form
@each_kind
def test_every_part_is_checked_against_the_layer(form: str, kind: str) -> None:
    layer, _ = layer_and_input(kind)
    delta = made(form, layer)
    for part, tensor in trained(delta).items():
        for broken in (tensor[..., :-1], tensor[..., None, None, None], torch.cat([tensor, tensor], dim=-1)):
            with pytest.raises(ValueError, match=r"'a'"):
                remade(layer, delta, delta.parts() | {part: broken})


@each_form
def test_a_saved_state_brings_every_number(form: str) -> None:
    layer, _ = layer_and_input("conv 3x3")
    delta, other = made(form, layer), made(form, layer, seed=1)
    delta.load_state_dict(other.state_dict())
    assert_close(delta.delta_weight(layer.weight), other.delta_weight(layer.weight))


@pytest.mark.slow
@each_form
@each_kind
def test_one_graph_serves_every_scale(form: str, kind: str) -> None:
    torch._dynamo.reset()
    layer, x = layer_and_input(kind)
    delta = made(form, layer)
    chain = with_deltas(layer, delta)
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for delta.scale in (0.3, -2.0, 0.0):
            torch.testing.assert_close(compiled(x), chain(x), rtol=1e-4, atol=1e-4)


@each_form
def test_a_structural_copy_has_the_same_tensors_and_its_own_scale(form: str) -> None:
    layer, x = layer_and_input("linear")
    delta = made(form, layer)
    chain = with_deltas(layer, delta)
    whole, twin = chain(x), chain.structural_copy()
    assert torch.equal(twin(x), whole)
    twin[0].scale = 0.0
    assert torch.equal(twin(x), layer(x)) and torch.equal(chain(x), whole)
    assert {id(tensor) for tensor in twin.parameters()} == {id(tensor) for tensor in chain.parameters()}
