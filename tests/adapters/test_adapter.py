"""Adapters take a place in a tree and give it back: the very same objects, keys, parents and output bits."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapter_specimens import (
    KINDS,
    PLACES,
    WIDTH,
    Deep,
    Doubled,
    Gain,
    Replaced,
    Side,
    Spread,
    adapted,
    make_input,
    make_model,
    picture,
)
from torch import nn

import refiners.fluxion.layers as fl

each_kind = pytest.mark.parametrize("kind", KINDS)
each_place = pytest.mark.parametrize("path", PLACES.values(), ids=PLACES)


# -- what adapters compute


@each_kind
@each_place
def test_an_adapter_computes_what_its_chain_says(kind: str, path: str) -> None:
    model, x = make_model(), make_input()
    target = model.get_submodule(path)
    adapter = KINDS[kind](target)
    expected = adapter.expected(target, x)
    assert not torch.equal(expected, target(x))
    assert adapter.inject() is adapter
    torch.testing.assert_close(adapter(x), expected, rtol=0, atol=0)


@each_kind
def test_the_whole_model_runs_with_the_adapter_in_place_of_its_target(kind: str) -> None:
    model, x = make_model(), make_input()
    first, residual, norm, last = list(model)
    adapter = adapted(kind, "Linear", model)
    expected = last(norm(residual(adapter.expected(first, x))))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_a_target_that_is_left_out_does_not_run() -> None:
    model, calls = make_model(), list[object]()
    target = model.Linear
    target.register_forward_hook(lambda *_: calls.append(1))
    adapter = Replaced(target).inject()
    model(make_input())
    assert calls == []
    assert adapter.target is target
    assert [type(child) for child in adapter][1:] == [fl.Return, fl.Linear]
    adapter.eject()
    model(make_input())
    assert calls == [1]


def test_an_adapter_of_a_chain_can_edit_deeper_and_take_it_back() -> None:
    model, x = make_model(), make_input()
    before, output = picture(model), model(x)
    adapter = Spread(model.Residual).inject()
    assert [type(part.parent).__name__ for part in adapter.parts] == ["Residual", "Residual"]
    own = [name for name, _ in model.named_parameters() if ".Side." in name]
    assert own == [
        f"Residual.{slot}.Side.Linear_2.{kind}" for slot in ("Linear_1", "Linear_2") for kind in ("weight", "bias")
    ]
    assert not torch.equal(model(x), output)
    adapter.eject()
    assert picture(model) == before
    assert torch.equal(model(x), output)


# -- attributes


def test_attributes_of_the_target_are_those_of_the_adapter() -> None:
    model = make_model()
    target = model.Linear
    for kind in ("Deep", "Side", "Replaced", "Doubled"):
        adapted(kind, "Linear", model)
    outermost = model.Linear
    assert isinstance(outermost, Doubled)
    assert (outermost.in_features, outermost.out_features) == (WIDTH, WIDTH)
    assert outermost.weight is target.weight and outermost.bias is target.bias
    assert outermost.dtype == torch.float32
    assert outermost.base is target and isinstance(outermost.target, Replaced)


def test_setting_a_parameter_of_the_target_through_the_adapter_sets_it_there() -> None:
    model, new = make_model(), nn.Parameter(torch.zeros(WIDTH, WIDTH))
    target = model.Linear
    adapted("Side", "Linear", model)
    adapted("Deep", "Linear", model)
    model.Linear.weight = new
    assert target.weight is new
    assert dict(model.named_parameters())["Linear.weight"] is new


def test_an_attribute_that_nobody_has_is_an_attribute_error() -> None:
    adapter = adapted("Side", "Linear", make_model())
    with pytest.raises(AttributeError, match="in_chanels"):
        _ = adapter.in_chanels
    assert not hasattr(adapter, "_nothing")


def test_own_tensors_of_the_adapter_are_its_own_attributes() -> None:
    model = make_model()
    adapter = adapted("Gain", "Linear", model)
    new = nn.Parameter(torch.zeros(WIDTH))
    adapter.gain = new
    assert adapter._parameters["gain"] is new
    assert "gain" not in model.Linear.base._parameters


# -- where an adapter goes


@each_kind
@pytest.mark.parametrize("path", ["Linear", "Residual.Linear_2", "Residual"])
@pytest.mark.parametrize("given", ["nothing", "parent", "root"])
def test_inject_finds_the_place_with_and_without_a_parent(kind: str, path: str, given: str) -> None:
    model = make_model()
    target, (parent_path, _, slot) = model.get_submodule(path), path.rpartition(".")
    place = model.get_submodule(parent_path)
    adapter = KINDS[kind](target)
    adapter.inject({"nothing": None, "parent": place, "root": model}[given])
    assert place._modules[slot] is adapter
    assert adapter.parent is place


@each_kind
def test_an_adapter_of_a_root_becomes_the_root(kind: str) -> None:
    model = make_model()
    adapter = KINDS[kind](model).inject()
    assert adapter.parent is None
    assert model.root is adapter
    assert model.Linear is model[0]
    adapter.eject()
    assert model.parent is None


def test_of_two_adapters_built_before_injecting_the_later_goes_inside() -> None:
    model, x = make_model(), make_input()
    target = model.Linear
    outer, inner = Doubled(target), Deep(target)
    outer.inject(model)
    inner.inject(model)
    assert model.Linear is outer
    assert outer.base is inner.base is target
    torch.testing.assert_close(outer(x), 2 * (x + target(x)), rtol=0, atol=0)


def test_an_adapter_of_an_adapter_goes_around_it() -> None:
    model, x = make_model(), make_input()
    target = model.Linear
    inner = Deep(target).inject()
    outer = Doubled(inner).inject(model)
    assert outer.target is inner and outer.base is target
    torch.testing.assert_close(model.Linear(x), 2 * (x + target(x)), rtol=0, atol=0)


def test_an_adapter_goes_in_and_out_as_often_as_one_likes() -> None:
    model, x = make_model(), make_input()
    before = picture(model)
    adapter = Side(model.Linear)
    outputs = []
    for _ in range(3):
        adapter.inject()
        outputs.append(model(x))
        adapter.eject()
        assert picture(model) == before
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


# -- ejecting


@each_kind
@each_place
def test_eject_restores_every_object_key_parent_and_bit(kind: str, path: str) -> None:
    model, x = make_model(), make_input()
    before, output = picture(model), model(x)
    adapter = adapted(kind, path, model)
    assert not torch.equal(model.root(x), output)
    adapter.eject()
    assert picture(model) == before
    assert torch.equal(model(x), output)
    assert adapter.parent is None


def two_before_injecting(target: nn.Module) -> list[Any]:
    first, second = Doubled(target), Side(target)
    return [first.inject(), second.inject(), Gain(first).inject()]


def each_on_the_one_before(target: nn.Module) -> list[Any]:
    first = Side(target).inject()
    second = Deep(first).inject()
    return [first, second, Replaced(second).inject()]


def one_slipped_in_between(target: nn.Module) -> list[Any]:
    first = Side(target).inject()
    outer = Gain(first).inject()
    return [first, outer, Deep(first).inject()]


@pytest.mark.parametrize("stack", [two_before_injecting, each_on_the_one_before, one_slipped_in_between])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@each_place
def test_stacked_adapters_are_ejected_in_any_order(
    stack: Callable[[nn.Module], list[Any]], order: tuple[int, ...], path: str
) -> None:
    model, x = make_model(), make_input()
    before, keys, output = picture(model), list(model.state_dict()), model(x)
    adapters = stack(model.get_submodule(path))
    for index in order:
        adapters[index].eject()
        assert adapters[index].parent is None
        assert set(keys) <= set(model.root.state_dict())
        assert torch.isfinite(model.root(x)).all()
    assert picture(model) == before
    assert torch.equal(model(x), output)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_what_remains_of_a_stack_computes_what_it_says(order: tuple[int, ...]) -> None:
    model, x = make_model(), make_input()
    target = model.Linear
    adapters = [Side(target).inject()]
    adapters.append(Gain(adapters[0]).inject())
    adapters.append(Doubled(adapters[1]).inject())
    left = list(adapters)
    for index in order:
        adapters[index].eject()
        left.remove(adapters[index])
        expected = target(x)
        for adapter in left:
            expected = adapter.expected(lambda _, value=expected: value, x)
        torch.testing.assert_close(model.Linear(x), expected, rtol=0, atol=0)


@each_place
def test_when_its_target_is_ejected_an_adapter_adapts_what_was_below(path: str) -> None:
    model, x = make_model(), make_input()
    target, before = model.get_submodule(path), picture(model)
    inner = Side(target).inject()
    middle = Gain(inner).inject()
    outer = Deep(middle).inject()
    inner.eject()
    assert middle.target is target
    assert outer.target is middle
    middle.eject()
    assert outer.target is target
    torch.testing.assert_close(outer(x), x + target(x), rtol=0, atol=0)
    outer.eject()
    assert picture(model) == before
    outer.inject()
    assert target.root is outer if target is model else outer.parent is not None
    assert outer.base is target
    outer.eject()
    assert picture(model) == before


def test_an_adapter_survives_when_its_neighbours_come_and_go() -> None:
    model, x = make_model(), make_input()
    adapter = adapted("Side", "Residual.Linear_1", model)
    output, before = model(x), picture(model)
    other = adapted("Gain", "Residual.Linear_2", model)
    around = adapted("Deep", "Residual", model)
    other.eject()
    around.eject()
    assert picture(model) == before
    assert torch.equal(model(x), output)
    adapter.eject()


# -- a module in two slots of one chain


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("make_shared", [lambda: fl.Linear(WIDTH, WIDTH), lambda: fl.Chain(fl.UseContext("a", "b"))])
def test_a_module_in_two_slots_is_adapted_in_each_and_restored(make_shared: Any, order: tuple[int, int]) -> None:
    shared = make_shared()
    model, x = fl.Chain(shared, fl.ReLU(), shared), make_input()

    def run() -> torch.Tensor:
        model.set_context("a", {"b": x})
        return model(x)

    before = run()
    adapters = [Doubled(shared).inject(model), Doubled(shared).inject(model)]
    assert list(model)[::2] == adapters
    assert not torch.equal(run(), before)
    for index in order:
        adapters[index].eject()
    assert model[0] is model[2] is shared
    assert torch.equal(run(), before)


def test_a_chain_in_two_slots_keeps_its_parent_when_one_adapter_goes_or_fails() -> None:
    shared = fl.Chain(fl.Identity())
    model = fl.Chain(shared, fl.ReLU(), shared)
    Doubled(shared).inject(model).eject()
    assert shared.parent is model
    with pytest.raises(RuntimeError, match="stop"), fl.transaction():
        Doubled(shared).inject(model)
        raise RuntimeError("stop")
    assert shared.parent is model
