"""Mistakes around adapters are explained, and what fails half-way leaves every tree as it was."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapter_specimens import (
    KINDS,
    WIDTH,
    Deep,
    Doubled,
    Side,
    lora_on,
    make_input,
    make_model,
    picture,
    randomize_own,
)
from torch import nn

import refiners.fluxion.layers as fl
from refiners.adapters import Adapter, LoraAdapter
from refiners.fluxion.layers import ownership


class Faulty(Side):
    """Edits the tree in every way, and fails at the end of what it was asked to do."""

    def __init__(self, target: nn.Module, root: fl.Chain, fails_to: str = "inject") -> None:
        super().__init__(target)
        self.trees, self.fails_to = [root], fails_to

    def inject(self, parent: fl.Chain | None = None) -> "Faulty":
        (root,) = self.trees
        if self.fails_to == "inject":
            root.append(fl.Identity())
            for adapter in list(root.layers(Doubled)):
                adapter.eject()
            Deep(root.Residual).inject()
            root.Residual.Residual.insert(0, fl.Identity())
        super().inject(parent)
        if self.fails_to == "inject":
            raise RuntimeError("inject fails")
        return self

    def eject(self) -> None:
        super().eject()
        self.trees[0].pop(0)
        if self.fails_to == "eject":
            raise RuntimeError("eject fails")


class Interrupted(fl.Chain, Adapter[nn.Module]):
    """A constructor that raises after the chain was built."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(fl.Chain(target), fl.Identity())
            raise LookupError("no weights")


class Loose(Adapter[nn.Module]):
    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__()


class Late(fl.Chain, Adapter[nn.Module]):
    def __init__(self, target: nn.Module) -> None:
        super().__init__(fl.Identity())
        with self.setup_adapter(target):
            pass


class Bare(fl.Chain, Adapter[nn.Module]):
    """Forgets setup_adapter."""


# -- mistakes


def injected_twice(model: fl.Chain) -> None:
    next(model.layers(Doubled)).inject()


def ejected_though_not_injected(model: fl.Chain) -> None:
    Side(model.Residual).eject()


def not_in_the_parent(model: fl.Chain) -> None:
    Side(model.Residual.Linear_1).inject(model.Chain)


def in_no_tree(model: fl.Chain) -> None:
    Side(fl.Linear(WIDTH, WIDTH)).inject()


def in_no_tree_but_a_parent_given(model: fl.Chain) -> None:
    Side(fl.Linear(WIDTH, WIDTH)).inject(model)


def in_two_trees(model: fl.Chain) -> None:
    copies.append(model.structural_copy())
    Side(model.Residual.Linear_1).inject()


def not_a_module(model: fl.Chain) -> None:
    Side("Linear_1")  # pyright: ignore[reportArgumentType]


def no_chain(model: fl.Chain) -> None:
    Loose(model.Residual)


def set_up_too_late(model: fl.Chain) -> None:
    Late(model.Residual)


def never_set_up(model: fl.Chain) -> None:
    Bare(fl.Identity()).inject(model)


def constructor_raises(model: fl.Chain) -> None:
    Interrupted(model.Residual)


def constructor_raises_for_a_leaf(model: fl.Chain) -> None:
    Interrupted(model.Residual.Linear_1)


def no_lora_for_a_chain(model: fl.Chain) -> None:
    LoraAdapter(model.Residual)  # pyright: ignore[reportArgumentType]


def on_an_adapter_that_is_not_injected(model: fl.Chain) -> None:
    Deep(Side(model.Residual)).inject()


def into_an_adapter_that_is_not_injected(model: fl.Chain) -> None:
    Deep(model.Residual).inject(Side(model.Residual))


copies: list[fl.Chain] = []
FAULTS: list[tuple[Callable[[fl.Chain], None], Any, str]] = [
    (injected_twice, RuntimeError, "Doubled is injected already, at Chain.Linear: eject it first"),
    (ejected_though_not_injected, RuntimeError, "Side is not injected, so it cannot be ejected"),
    (not_in_the_parent, ValueError, "Linear is not in this Chain: its children are LayerNorm, Linear"),
    (in_no_tree, ValueError, "the target, a Linear, sits in no Chain"),
    (in_no_tree_but_a_parent_given, ValueError, "Linear is not in this Chain"),
    (in_two_trees, ValueError, "the target, a Linear, sits in .*Chain.Residual, .*say which parent"),
    (not_a_module, TypeError, "Side adapts a module, not str: 'Linear_1'"),
    (no_chain, TypeError, "Loose must be a Chain"),
    (set_up_too_late, RuntimeError, "Late: setup_adapter must wrap super"),
    (never_set_up, AttributeError, "Bare has no target: its constructor must use setup_adapter"),
    (constructor_raises, LookupError, "no weights"),
    (constructor_raises_for_a_leaf, LookupError, "no weights"),
    (no_lora_for_a_chain, TypeError, "LoraAdapter adapts a Linear or a Conv2d, not a Residual"),
    (on_an_adapter_that_is_not_injected, (RuntimeError, ValueError), "inject"),
    (into_an_adapter_that_is_not_injected, (RuntimeError, ValueError), "inject"),
]


@pytest.mark.parametrize(("fault", "kind", "words"), FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS])
def test_a_mistake_is_explained_and_changes_nothing(fault: Callable[[fl.Chain], None], kind: Any, words: str) -> None:
    model, x = make_model(), make_input()
    Doubled(model.Linear).inject()
    before, output = picture(model), model(x)
    holders = [ownership.holders(module) for module in model.modules()]
    with pytest.raises(kind, match=words):
        fault(model)
    copies.clear()
    gc.collect()
    assert picture(model) == before
    assert torch.equal(model(x), output)
    assert [ownership.holders(module) for module in model.modules()] == holders


def test_an_adapter_of_one_that_was_ejected_is_not_injected_into_nothing() -> None:
    model = make_model()
    inner = Side(model.Linear).inject()
    outer = Deep(inner).inject()
    outer.eject()
    inner.eject()
    before = picture(model)
    with pytest.raises((RuntimeError, ValueError), match="inject"):
        outer.inject()
    assert picture(model) == before
    inner.inject()
    outer.inject()
    assert model.Linear is outer


def test_an_adapter_that_failed_to_go_in_can_go_in_elsewhere() -> None:
    model = make_model()
    adapter = Side(model.Residual.Linear_1)
    with pytest.raises(ValueError, match="is not in this Chain"):
        adapter.inject(model.Chain)
    assert adapter.inject(model.Residual).parent is model.Residual


def test_the_target_of_a_failed_constructor_can_be_adapted() -> None:
    model = make_model()
    for target in (model.Residual, model.Linear):
        with pytest.raises(LookupError):
            Interrupted(target)
        Side(target).inject()
    assert isinstance(model[0], Side) and isinstance(model[1], Side)


@pytest.mark.parametrize("path", ["Linear", "Residual.Linear_2", "Chain"])
def test_an_inject_that_raises_half_way_leaves_everything_as_it_was(path: str) -> None:
    model, x = make_model(), make_input()
    on_norm, on_last = Doubled(model.Chain.LayerNorm).inject(), lora_on(model.Chain.Linear).inject()
    before, output = picture(model), model(x)
    faulty = Faulty(model.get_submodule(path), model)
    own = picture(faulty)
    with pytest.raises(RuntimeError, match="inject fails"):
        faulty.inject()
    assert picture(model) == before and picture(faulty) == own
    assert torch.equal(model(x), output)
    faulty.fails_to = ""
    assert faulty.inject().root is model
    on_norm.eject()
    on_last.eject()


def test_an_eject_that_raises_half_way_leaves_everything_as_it_was() -> None:
    model, x = make_model(), make_input()
    faulty = Faulty(model.Residual, model, fails_to="eject").inject()
    randomize_own(faulty)
    before, output = picture(model), model(x)
    with pytest.raises(RuntimeError, match="eject fails"):
        faulty.eject()
    assert picture(model) == before
    assert torch.equal(model(x), output)


@pytest.mark.parametrize("make", [*KINDS.values(), lora_on], ids=[*KINDS, "LoraAdapter"])
def test_a_transaction_around_several_adapters_takes_all_of_them_back(make: Callable[[nn.Module], Any]) -> None:
    model, x = make_model(), make_input()
    first, second = make(model.Linear).inject(), make(model.Residual.Linear_1).inject()
    before, output = picture(model), model(x)
    with pytest.raises(LookupError, match=r"^no weights$"), fl.transaction():
        first.eject()
        make(model.Residual.Linear_2).inject()
        make(model.Linear).inject()
        first.inject()
        make(second).inject()
        second.eject()
        raise LookupError("no weights")
    assert picture(model) == before
    assert torch.equal(model(x), output)
