"""LoHas and LoKrs run as what every weight update promises, as a weight and through their factors."""

import pytest
import torch
from delta_specimens import ALL_LAYERS, BATCH, assert_close, with_deltas, with_values
from factored_specimens import ALPHA, SETTINGS, layer_and_input, made, start_of, updated

from refiners.adapters import LoraAdapter

pytestmark = pytest.mark.usefixtures("way")
each_form = pytest.mark.parametrize("form", SETTINGS)
each_kind = pytest.mark.parametrize("kind", ["linear", "conv 1x1", "conv 3x3"])
FORMATS = [
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.float32),
]


@each_form
@pytest.mark.parametrize("kind", ALL_LAYERS)
def test_an_update_equals_the_layer_with_the_updated_weight(form: str, kind: str) -> None:
    layer, x = layer_and_input(kind)
    delta = made(form, layer, scale=-0.7)
    adapted = with_deltas(layer, delta)
    assert_close(adapted(x), updated(layer, x, delta))
    assert_close(layer(x) + delta.update(x, layer(x), layer), updated(layer, x, delta))


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
    one, other, third = made(form, layer, "one"), made(form, layer, "other", 0.3, seed=1), made("LoHa", layer, "third")
    chain = with_deltas(layer, one, other, third)
    lora = LoraAdapter(chain[0], rank=2, name="lora").inject().loras["lora"]
    with_values([lora.up.weight], seed=3)
    expected = updated(layer, x, one, other, third) + lora.update(x, x, layer)
    assert_close(chain(x), expected)


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
    expected = updated(layer, x, delta)
    parts = {part: tensor.transpose(0, 1).contiguous().transpose(0, 1) for part, tensor in delta.parts().items()}
    chain = with_deltas(layer, type(delta).from_parts(layer, "a", parts, ALPHA))
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
@pytest.mark.parametrize("kind", ["linear", "conv 3x3"])
@pytest.mark.parametrize(("base", "parts"), FORMATS)
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
    assert torch.equal(chain(x), before)
    (chain(x) - before - 1).square().sum().backward()
    torch.optim.SGD(delta.parameters(), lr=0.01).step()
    assert (chain(x) - before).abs().max() > 1e-4


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
