"""Adapted trees are copied, saved and called with contexts like any other; what is done to a copy stays there."""

import copy
import io
import pickle
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
    Side,
    Spread,
    adapted,
    lora_on,
    make_input,
    make_model,
    picture,
)
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.adapters import Adapter, LoraAdapter
from refiners.fluxion.context import Contexts

each_kind = pytest.mark.parametrize("kind", KINDS)
each_place = pytest.mark.parametrize("path", PLACES.values(), ids=PLACES)


def by_structure(tree: Any) -> Any:
    return tree.structural_copy()


def by_pickle(tree: Any) -> Any:
    return pickle.loads(pickle.dumps(tree))


def by_torch(tree: Any) -> Any:
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


each_way = pytest.mark.parametrize("duplicate", [by_structure, copy.deepcopy, by_pickle, by_torch])


def adapters_in(tree: fl.Chain) -> list[Any]:
    """The adapters of a tree, outermost first."""
    return [module for module in tree.modules() if isinstance(module, Adapter)]


def stacked(path: str = "Residual") -> fl.Chain:
    """A model with a stack on one target, built in every way, and a LoRA elsewhere."""
    model = make_model()
    target = model.get_submodule(path)
    inner = Side(target)
    outer = Doubled(target).inject()
    inner.inject()
    Gain(outer).inject()
    lora_on(model.Chain.Linear).inject()
    return model.root


# -- copies


@each_way
@each_kind
@each_place
def test_a_copy_of_an_adapted_tree_computes_the_same_under_the_same_names(
    duplicate: Callable[[Any], Any], kind: str, path: str
) -> None:
    model, x = make_model(), make_input()
    adapted(kind, path, model)
    clone = duplicate(model.root)
    assert torch.equal(clone(x), model.root(x))
    for listing in ("state_dict", "named_parameters", "named_buffers", "named_modules"):
        assert list(dict(getattr(clone, listing)())) == list(dict(getattr(model.root, listing)()))
    (adapter,) = adapters_in(clone)
    assert adapter.target in set(clone.modules())
    for chain in clone.modules():
        for child in chain.children():
            if isinstance(child, fl.ContextModule):
                assert child.parent is chain


@each_way
@each_kind
@each_place
def test_ejecting_in_a_copy_leaves_the_original_adapted(duplicate: Callable[[Any], Any], kind: str, path: str) -> None:
    model, x = make_model(), make_input()
    output, keys = model(x), list(model.state_dict())
    adapter = adapted(kind, path, model)
    before, adapted_output = picture(model.root), model.root(x)
    (copied,) = adapters_in(duplicate(model.root))
    root = copied.root
    copied.eject()
    root = root if root is not copied else copied.target
    assert torch.equal(root(x), output)
    assert list(root.state_dict()) == keys
    assert picture(model.root) == before
    assert torch.equal(model.root(x), adapted_output)
    adapter.eject()
    assert torch.equal(model(x), output)


@each_way
@each_kind
@each_place
def test_ejecting_in_the_original_leaves_a_copy_adapted(duplicate: Callable[[Any], Any], kind: str, path: str) -> None:
    model, x = make_model(), make_input()
    plain = picture(model)
    adapter = adapted(kind, path, model)
    clone = duplicate(model.root)
    before, output = picture(clone), clone(x)
    adapter.eject()
    assert picture(model) == plain
    assert picture(clone) == before
    assert torch.equal(clone(x), output)


@each_way
@pytest.mark.parametrize("path", ["Linear", "Residual", ""])
@pytest.mark.parametrize("seed", range(3))
def test_a_copied_stack_is_ejected_in_any_order(duplicate: Callable[[Any], Any], path: str, seed: int) -> None:
    x, model = make_input(), stacked(path)
    clone = duplicate(model)
    before, output = picture(model), model(x)
    assert torch.equal(clone(x), output)
    adapters = adapters_in(clone)
    base = clone if path else adapters[0].base
    assert len(adapters) == 4
    for index in torch.randperm(4, generator=torch.Generator().manual_seed(seed)).tolist():
        adapters[index].eject()
    assert torch.equal(base(x), make_model()(x))
    assert list(base.state_dict()) == list(make_model().state_dict())
    assert picture(model) == before
    assert torch.equal(model(x), output)


def test_in_a_structural_copy_targets_are_the_copy_s_own_chains_and_leaves_are_shared() -> None:
    model = stacked("Residual")
    clone = model.structural_copy()
    for ours, theirs in zip(adapters_in(clone), adapters_in(model), strict=True):
        assert ours is not theirs
        assert ours.target is not theirs.target or not isinstance(ours.target, fl.Chain)
        assert ours.target in set(clone.modules())
        assert ours.base is not theirs.base or not isinstance(ours.base, fl.Chain)
    assert [id(p) for p in clone.parameters()] == [id(p) for p in model.parameters()]


def test_a_structural_copy_can_be_adapted_differently() -> None:
    model, x = make_model(), make_input()
    output, twin = model(x), model.structural_copy()
    Deep(twin.Linear).inject(twin)
    Side(twin.Residual).inject()
    assert torch.equal(model(x), output)
    assert not torch.equal(twin(x), output)
    Gain(model.Residual).inject()
    assert [type(adapter) for adapter in adapters_in(twin)] == [Deep, Side]
    assert [type(adapter) for adapter in adapters_in(model)] == [Gain]


@each_way
@pytest.mark.parametrize("path", ["Linear", "Residual"])
def test_a_copy_of_an_adapter_that_is_not_injected_says_so_or_goes_in(duplicate: Any, path: str) -> None:
    model, x = make_model(), make_input()
    before = picture(model)
    adapter = Side(model.get_submodule(path))
    clone = duplicate(adapter)
    assert torch.equal(clone(x), adapter(x))
    with pytest.raises(RuntimeError, match="not injected"):
        clone.eject()
    if duplicate is not by_structure or path == "Residual":
        tree = fl.Chain(clone.target)
        clone.inject()
        assert tree[0] is clone
        assert torch.equal(tree(x), adapter(x))
        clone.eject()
        assert tree[0] is clone.target
    assert picture(model) == before


@pytest.mark.parametrize("path", ["Linear", "Residual"])
def test_a_model_and_its_waiting_adapter_are_copied_together(path: str) -> None:
    model, x = make_model(), make_input()
    adapter = Side(model.get_submodule(path))
    twin, waiting = copy.deepcopy((model, adapter))
    assert waiting.target is twin.get_submodule(path)
    waiting.inject(twin)
    assert adapters_in(twin) == [waiting] and adapters_in(model) == []
    adapter.inject()
    assert torch.equal(twin(x), model(x))


@each_way
def test_an_adapter_with_edits_deeper_down_is_copied_with_them(duplicate: Callable[[Any], Any]) -> None:
    model, x = make_model(), make_input()
    Spread(model.Residual).inject()
    clone = duplicate(model)
    assert torch.equal(clone(x), model(x))
    assert len(adapters_in(clone)) == 3


@each_way
def test_a_copied_lora_has_a_scale_of_its_own(duplicate: Callable[[Any], Any]) -> None:
    model, x = make_model(), make_input()
    adapter = lora_on(model.Linear, scale=0.5).inject()
    clone = duplicate(model)
    output = model(x)
    clone.layer(0, LoraAdapter).scale = 2.0
    assert torch.equal(model(x), output)
    assert not torch.equal(clone(x), output)
    adapter.scale = 2.0
    assert torch.equal(model(x), clone(x))


# -- contexts


class Told(fl.Sum, Adapter[nn.Module]):
    """Adds a value of a context, and has one of its own to start with."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(target, fl.UseContext("side", "value"), fl.UseContext("own", "value"))

    def init_context(self) -> Contexts:
        return {"own": {"value": 100.0}}


def listening() -> fl.Chain:
    """Its output is the Linear's and the value of a context."""
    return fl.Chain(
        fl.Chain(fl.Linear(WIDTH, WIDTH), fl.Sum(fl.Identity(), fl.UseContext("side", "value"))), fl.Identity()
    )


@pytest.mark.parametrize(("path", "times"), [("Chain.Linear", 1), ("Chain", 1), ("Chain.Sum", 1), ("", 1)])
def test_contexts_reach_the_target_and_the_adapter(path: str, times: int) -> None:
    model, x = listening(), make_input()
    linear = model.Chain.Linear
    adapter = Told(model.get_submodule(path)).inject()
    for value in (1.0, 2.0):
        adapter.set_context("side", {"value": torch.tensor(value)})
        torch.testing.assert_close(model.root(x), linear(x) + 2 * value + 100 * times)
    with pytest.raises(KeyError, match="side"):
        model.root(x)
    adapter.eject()
    model.set_context("side", {"value": torch.tensor(1.0)})
    torch.testing.assert_close(model(x), linear(x) + 1)


@each_kind
@pytest.mark.parametrize("path", ["Chain.Linear", "Chain", ""])
def test_a_context_set_before_an_adapter_comes_is_there_after(kind: str, path: str) -> None:
    model, x = listening(), make_input()
    model.set_context("side", {"value": torch.tensor(7.0)})
    adapted(kind, path, model)
    assert model.root.contexts["side"]["value"] == 7
    assert model.root(x).shape == x.shape


@each_kind
@pytest.mark.parametrize("path", ["Chain.Linear", "Chain"])
def test_a_context_set_before_an_adapter_goes_is_there_after(kind: str, path: str) -> None:
    model, x = listening(), make_input()
    linear = model.Chain.Linear
    adapter = adapted(kind, path, model)
    model.set_context("side", {"value": torch.tensor(7.0)})
    adapter.eject()
    torch.testing.assert_close(model(x), linear(x) + 7)


def test_a_layer_inside_an_adapter_writes_what_later_layers_read() -> None:
    class Tap(fl.Chain, Adapter[nn.Module]):
        def __init__(self, target: nn.Module) -> None:
            with self.setup_adapter(target):
                super().__init__(target, fl.SetContext("side", "value"))

    model, x = listening(), make_input()
    linear = model.Chain.Linear
    adapter = Tap(linear).inject()
    torch.testing.assert_close(model(x), 2 * linear(x))
    adapter.eject()
    with pytest.raises(KeyError, match="side"):
        model(x)


def test_two_structural_copies_have_contexts_of_their_own() -> None:
    model, x = listening(), make_input()
    Told(model.Chain).inject()
    twin = model.structural_copy()
    model.set_context("side", {"value": torch.tensor(1.0)})
    twin.set_context("side", {"value": torch.tensor(5.0)})
    difference: Tensor = twin(x) - model(x)
    torch.testing.assert_close(difference, torch.full_like(difference, 8.0))


def test_an_error_inside_an_adapter_says_where_it_happened() -> None:
    model = make_model()
    adapted("Deep", "Residual", model)
    with pytest.raises(RuntimeError) as caught:
        model(torch.zeros(3, WIDTH + 1))
    assert any("Chain > Linear" in note for note in caught.value.__notes__)
    model.Linear.register_forward_hook(lambda module, inputs, output: torch.zeros(3, WIDTH + 1))
    with pytest.raises(RuntimeError) as caught:
        model(make_input())
    (note,) = (note for note in caught.value.__notes__ if "in the tree" in note)
    assert "Linear_1" in note and f"expects last dimension of size {WIDTH}, but got {WIDTH + 1}" in note
