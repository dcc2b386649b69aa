"""Edits of a Chain: slots never move, a module sits in one tree, and a failed edit leaves everything as it was."""

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl


class Wide(nn.Linear):
    """A class other than Linear, with the same parameters."""


class FailsLate(fl.Chain):
    """A chain whose constructor raises when its children are in place."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__(*children)
        raise RuntimeError("late")


@pytest.fixture(autouse=True, scope="module")
def frozen_imports() -> Iterator[None]:
    """Refusals collect garbage first: keep what imports made out of that, or each takes a tenth of a second."""
    gc.freeze()
    yield
    gc.unfreeze()


def slots_of(chain: fl.Chain) -> list[str]:
    return list(chain._modules)


def linears(count: int = 3) -> fl.Chain:
    return fl.Chain(fl.Linear(4, 4) for _ in range(count))


def tree_with_all() -> fl.Chain:
    return fl.Chain(fl.Linear(4, 4), fl.ReLU(), fl.Residual(nn.Linear(4, 4), fl.Identity()), fl.Linear(4, 4))


def fingerprint(*trees: fl.Chain) -> list[Any]:
    """All that an edit may change: names, objects, what holds what, parents, plans and outputs."""
    modules = [module for tree in trees for module in tree.modules()]
    nodes = [(name, module) for tree in trees for name, module in tree.named_modules()]
    parents = [getattr(module, "parent", None) for module in modules]
    plans = [getattr(module, "_plan", None) for module in modules]
    keys = [list(tree.state_dict()) for tree in trees]
    outputs = [tree(torch.linspace(-1, 1, 8).view(2, 4)).tolist() for tree in trees]
    return [nodes, parents, plans, keys, outputs]


# --- inserting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "place"), [(0, 0), (1, 1), (2, 2), (3, 3), (-1, 3), (-2, 2), (-3, 1), (-4, 0)])
def test_insert_puts_it_before_the_index_and_minus_one_last(index: int, place: int) -> None:
    chain = linears(3)
    children, new = list(chain), fl.ReLU()
    chain.insert(index, new)
    assert list(chain) == [*children[:place], new, *children[place:]]
    assert chain._plan == tuple(chain)


@pytest.mark.parametrize("index", [4, -5, 100])
def test_insert_beyond_the_ends_is_an_index_error(index: int) -> None:
    chain = linears(3)
    with pytest.raises(IndexError, match=f"cannot insert at {index}: Chain has 3 children"):
        chain.insert(index, fl.ReLU())
    assert slots_of(chain) == ["Linear_1", "Linear_2", "Linear_3"]


def test_insert_by_type_goes_before_or_after_the_first_of_it() -> None:
    chain = fl.Chain(fl.ReLU(), fl.Linear(4, 4), fl.ReLU(), nn.Linear(4, 4))
    chain.insert_before_type(nn.Linear, fl.SiLU())
    chain.insert_after_type(nn.Linear, fl.Sigmoid())
    chain.insert_after_type(fl.ReLU, fl.Identity())
    assert slots_of(chain) == ["ReLU_1", "Identity", "SiLU", "Linear_1", "Sigmoid", "ReLU_2", "Linear_2"]


@pytest.mark.parametrize("method", ["insert_before_type", "insert_after_type"])
def test_insert_by_a_type_that_is_not_there_names_it(method: str) -> None:
    chain = fl.Chain(fl.Chain(fl.Conv2d(1, 1, 1)))
    with pytest.raises(ValueError, match="no Conv2d among the children of this Chain"):
        getattr(chain, method)(fl.Conv2d, fl.ReLU())


# --- taking out, putting in the place of ------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, 2, -1, -2, -3])
def test_pop_takes_out_and_returns(index: int) -> None:
    chain = linears(3)
    expected = list(chain)
    popped = expected.pop(index)
    assert chain.pop(index) is popped
    assert list(chain) == list(chain._plan) == expected


@pytest.mark.parametrize("name", ["Linear", "Linear_1", "Linear_2", "ReLU"])
def test_pop_takes_a_name_as_indexing_does(name: str) -> None:
    shared = fl.Linear(4, 4)
    chain = fl.Chain(shared, fl.ReLU(), shared) if name.startswith("Linear_") else fl.Chain(shared, fl.ReLU())
    expected = {slot: child for slot, child in chain._modules.items() if slot != name}
    child = chain[name]
    assert chain.pop(name) is child
    assert chain._modules == expected


def test_pop_takes_the_name_of_a_class_and_refuses_other_keys() -> None:
    chain = fl.Chain(fl.Linear(4, 4), fl.LayerNorm(4), fl.Linear(4, 4))
    chain.replace(chain.LayerNorm, fl.ReLU())  # in the slot LayerNorm
    assert isinstance(chain.pop("ReLU"), fl.ReLU)
    with pytest.raises(KeyError, match="no child 'GeLU'"):
        chain.pop("GeLU")
    with pytest.raises(TypeError, match="pop takes one child, by its index or name"):
        chain.pop(slice(0, 1))  # pyright: ignore[reportArgumentType]
    assert len(chain) == 2


def test_pop_takes_the_last_and_refuses_what_is_not_there() -> None:
    chain = linears(2)
    first, last = chain
    assert chain.pop() is last
    with pytest.raises(IndexError):
        chain.pop(1)
    assert chain.pop() is first
    with pytest.raises(IndexError):
        chain.pop()


@pytest.mark.parametrize("stranger", [fl.Linear(4, 4), fl.Chain()])
def test_remove_and_replace_want_a_child(stranger: nn.Module) -> None:
    tree = tree_with_all()
    for module in (stranger, tree.Residual.Identity, tree):
        with pytest.raises(ValueError, match="is not a child of this Chain: its children are Linear_1, ReLU"):
            tree.remove(module)
        with pytest.raises(ValueError, match="is not a child of this Chain"):
            tree.replace(module, fl.ReLU())


def test_replace_takes_over_the_slot_and_runs() -> None:
    chain = linears(2)
    old, new = chain[0], Wide(4, 4)
    chain.replace(old, new)
    assert slots_of(chain) == ["Linear_1", "Linear_2"] and chain[0] is new
    x = torch.randn(2, 4)
    assert torch.equal(chain(x), chain[1](new(x)))
    assert fl.Chain(old)[0] is old


def test_setting_and_deleting_a_slot_is_replace_and_remove() -> None:
    tree, new = tree_with_all(), fl.Chain(fl.SiLU())
    residual = tree.Residual
    tree.Residual = new
    assert tree[2] is new and new.parent is tree and residual.parent is None
    assert tree._plan[2] is new
    del tree.ReLU
    assert slots_of(tree) == ["Linear_1", "Residual", "Linear_2"]
    assert len(tree._plan) == 3


def test_set_submodule_of_torch_replaces() -> None:
    tree, new = tree_with_all(), fl.Chain(fl.SiLU())
    tree.set_submodule("Residual.Linear", new)
    assert tree.Residual.Linear is new is tree.Residual._plan[0] and new.parent is tree.Residual


def test_setting_a_slot_to_none_never_leaves_a_layer_running_unseen() -> None:
    chain = fl.Chain(fl.Linear(4, 4), fl.ReLU())
    try:
        chain.ReLU = None
    except TypeError:
        assert chain[1] is chain._plan[1]
    else:
        assert len(chain) == len(list(chain)) == len(chain._plan) == 1


def test_a_chain_that_joins_deep_down_starts_its_contexts_too() -> None:
    class Starts(fl.Chain):
        def init_context(self) -> dict[str, dict[str, int]]:
            return {"side": {"data": 7}}

    tree = fl.Chain(fl.Chain(fl.Chain()))
    assert tree.contexts == {} and tree(1) == 1
    tree.Chain.Chain.append(Starts(fl.UseContext("side", "data")))
    assert tree(1) == 7


def test_modules_join_by_append_and_insert_only() -> None:
    chain = linears(2)
    for add in (chain.add_module, chain.register_module):
        with pytest.raises(ValueError, match="append or insert"):
            add("Linear_3", fl.Linear(4, 4))
    with pytest.raises(ValueError, match="no slot 'head'"):
        chain.head = fl.Linear(4, 4)
    assert slots_of(chain) == ["Linear_1", "Linear_2"]


def test_other_attributes_are_set_as_in_torch() -> None:
    chain = linears(1)
    chain.label, chain.side = "x", [fl.Linear(4, 4)]
    chain.scale = nn.Parameter(torch.ones(1))
    del chain.label
    assert not hasattr(chain, "label")
    assert list(chain.state_dict()) == ["scale", "Linear.weight", "Linear.bias"]


# --- slots never move -------------------------------------------------------------------------------------------------


EDITS: dict[str, Callable[[fl.Chain], Any]] = {
    "insert": lambda chain: chain.insert(0, fl.Linear(4, 4)),
    "append": lambda chain: chain.append(fl.Linear(4, 4)),
    "before type": lambda chain: chain.insert_before_type(fl.ReLU, fl.Residual()),
    "after type": lambda chain: chain.insert_after_type(fl.ReLU, nn.Linear(4, 4)),
    "pop": lambda chain: chain.pop(0),
    "remove": lambda chain: chain.remove(chain.ReLU),
    "replace": lambda chain: chain.replace(chain.Residual, Wide(4, 4)),
    "setattr": lambda chain: setattr(chain, "Linear_2", fl.Chain(fl.Linear(4, 4))),
    "delattr": lambda chain: delattr(chain, "Linear_1"),
    "below": lambda chain: chain.Residual.insert(0, fl.Linear(4, 4)),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_no_edit_renames_a_module_that_stays(edit: Callable[[fl.Chain], Any]) -> None:
    tree = tree_with_all()
    before = {id(module): name for name, module in tree.named_modules()}
    tensors = {id(tensor): name for name, tensor in tree.state_dict(keep_vars=True).items()}
    kept = list(tree.modules())  # so that no id is used twice
    edit(tree)
    after = {id(module): name for name, module in tree.named_modules()}
    assert after.keys() != before.keys(), "the edit did nothing"
    assert all(before.get(key, name) == name for key, name in after.items())
    assert all(tensors.get(id(t), name) == name for name, t in tree.state_dict(keep_vars=True).items())
    assert len(kept) == 7


def test_a_new_slot_is_numbered_after_the_highest_that_is_taken() -> None:
    chain = fl.Chain(fl.Linear(4, 4), fl.ReLU())
    chain.append(fl.Linear(4, 4))
    chain.insert(0, nn.Linear(4, 4))
    assert slots_of(chain) == ["Linear_3", "Linear", "ReLU", "Linear_2"]
    chain.remove(chain.Linear)
    chain.append(fl.Linear(4, 4))
    assert slots_of(chain) == ["Linear_3", "ReLU", "Linear_2", "Linear_4"]
    chain.replace(chain.ReLU, fl.SiLU())
    chain.append(fl.ReLU())
    assert slots_of(chain) == ["Linear_3", "ReLU", "Linear_2", "Linear_4", "ReLU_2"]


def test_plain_torch_leaves_are_children_like_any_other() -> None:
    tree = fl.Chain(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)))
    tree.append(nn.Linear(8, 2))
    assert list(tree.state_dict())[-2:] == ["Linear_2.weight", "Linear_2.bias"]
    assert tree(torch.randn(3, 4)).shape == (3, 2)
    assert tree.find_parent(tree[0]) is tree and len(list(tree.layers(nn.Linear))) == 2


# --- one tree each ----------------------------------------------------------------------------------------------------


PUT_INTO_ANOTHER: dict[str, Callable[[fl.Chain, nn.Module], Any]] = {
    "build": lambda other, module: fl.Chain(fl.ReLU(), module),
    "append": lambda other, module: other.append(module),
    "insert": lambda other, module: other.insert(0, module),
    "replace": lambda other, module: other.replace(other[0], module),
    "setattr": lambda other, module: setattr(other, "ReLU", module),
}


@pytest.mark.parametrize("put", PUT_INTO_ANOTHER.values(), ids=PUT_INTO_ANOTHER.keys())
@pytest.mark.parametrize("slot", ["Linear_1", "ReLU", "Residual", "Residual.Linear"])
def test_a_module_cannot_sit_in_two_trees(put: Callable[[fl.Chain, nn.Module], Any], slot: str) -> None:
    tree, other = tree_with_all(), fl.Chain(fl.ReLU(), fl.Identity())
    module = tree.get_submodule(slot)
    before = fingerprint(tree, other)
    with pytest.raises(ValueError, match=f"{type(module).__name__} already sits in Chain.*cannot sit in two trees"):
        put(other, module)
    assert fingerprint(tree, other) == before


@pytest.mark.parametrize("put", PUT_INTO_ANOTHER.values(), ids=PUT_INTO_ANOTHER.keys())
@pytest.mark.parametrize("take", [lambda tree, module: tree.remove(module), lambda tree, _: tree.pop(2)])
@pytest.mark.parametrize("child", [fl.Residual, lambda: nn.Linear(4, 4)])
def test_a_module_that_was_taken_out_can_go_elsewhere(put: Any, take: Any, child: Callable[[], nn.Module]) -> None:
    module = child()
    tree, other = fl.Chain(fl.Identity(), fl.SiLU(), module), fl.Chain(fl.ReLU(), fl.Identity())
    take(tree, module)
    holder = put(other, module) or other
    assert any(child is module for child in holder)
    assert getattr(module, "parent", holder) is holder


def test_a_leaf_is_free_when_its_tree_was_dropped() -> None:
    leaf = fl.Linear(4, 4)
    tree = fl.Chain(fl.Chain(leaf))
    del tree
    assert fl.Chain(leaf)[0] is leaf


@pytest.mark.parametrize("slot", ["", "Chain", "Chain.Chain"])
def test_a_chain_cannot_be_put_into_or_below_itself(slot: str) -> None:
    tree = fl.Chain(fl.Chain(fl.Chain(fl.Identity())))
    place = tree.get_submodule(slot)
    for put in (place.append, lambda module: place.replace(place[0], module)):
        with pytest.raises(ValueError, match="into itself or below itself"):
            put(tree)
    assert len(list(tree.modules())) == 4 and place._plan == tuple(place)


def test_a_chain_cannot_come_below_itself_inside_a_foreign_module() -> None:
    tree = fl.Chain(fl.Chain(fl.Identity()))
    with pytest.raises(ValueError, match="below itself"):
        tree.Chain.append(nn.Sequential(tree))
    assert len(list(tree.modules())) == 3


def test_a_shallow_copy_of_a_leaf_shares_its_weights_on_purpose() -> None:
    first = fl.Chain(fl.Linear(4, 4))
    second = fl.Chain(copy.copy(first[0]))
    assert second[0].weight is first[0].weight
    assert second[0] is not first[0]


# --- whole or not at all ----------------------------------------------------------------------------------------------


FAILURES: dict[str, Callable[[fl.Chain, fl.Chain], Any]] = {
    "build": lambda tree, other: fl.Chain(fl.Chain(fl.ReLU()), other.pop, tree[0]),
    "build with a taken one last": lambda tree, other: fl.Residual(fl.Chain(), fl.Linear(4, 4), tree.Residual),
    "insert no module": lambda tree, other: tree.insert(0, 3),  # type: ignore[arg-type]
    "insert far out": lambda tree, other: tree.insert(9, fl.ReLU()),
    "insert a taken one": lambda tree, other: tree.Residual.insert(0, other[0]),
    "replace by no module": lambda tree, other: tree.replace(tree[0], None),  # type: ignore[arg-type]
    "replace by a parent": lambda tree, other: tree.Residual.replace(tree.Residual[0], tree),
    "setattr": lambda tree, other: setattr(tree, "ReLU", other[0]),
    "pop": lambda tree, other: tree.pop(-9),
    "plus": lambda tree, other: tree + nn.ModuleList([other[0]]) + 3,  # type: ignore[operator]
}


@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES.keys())
def test_a_failed_edit_leaves_every_tree_as_it_was(fail: Callable[[fl.Chain, fl.Chain], Any]) -> None:
    tree, other = tree_with_all(), linears(2)
    before = fingerprint(tree, other)
    with pytest.raises((ValueError, TypeError, IndexError)):
        fail(tree, other)
    assert fingerprint(tree, other) == before


def test_a_failed_constructor_leaves_its_children_free() -> None:
    free, taken = fl.Chain(fl.ReLU()), linears(1)[0]
    holder = fl.Chain(taken)
    with pytest.raises(ValueError, match="already sits"):
        fl.Chain(free, taken)
    assert free.parent is None and fl.Chain(free)[0] is free
    assert holder[0] is taken


@pytest.mark.parametrize("child", [lambda: nn.Linear(4, 4), fl.Chain, lambda: fl.UseContext("a", "b")])
def test_a_constructor_that_fails_late_leaves_its_children_free(child: Callable[[], nn.Module]) -> None:
    module = child()
    with pytest.raises(RuntimeError, match="late"):
        FailsLate(module)
    gc.collect()
    assert getattr(module, "parent", None) is None
    assert fl.Chain(module)[0] is module


def test_a_transaction_takes_back_all_edits_in_all_trees() -> None:
    tree, other = tree_with_all(), linears(2)
    before = fingerprint(tree, other)
    with pytest.raises(KeyError), fl.transaction():
        moved = tree.Residual.pop(0)
        other.replace(other[0], moved)
        tree.ReLU = fl.Chain(other.pop(1))
        tree.insert(1, fl.Residual(fl.Identity()))
        fl.Chain(tree.pop())
        del tree.Residual
        assert fingerprint(other) != before
        raise KeyError
    gc.collect()
    assert fingerprint(tree, other) == before


def test_transactions_nest_and_keep_what_ends_well() -> None:
    tree = linears(1)
    with fl.transaction():
        tree.append(fl.Identity())
        tree.pop(0)
    assert slots_of(tree) == ["Identity"]
    other = linears(2)
    before = fingerprint(tree, other)
    with pytest.raises(RuntimeError), fl.transaction():
        tree.append(fl.ReLU())
        with pytest.raises(KeyError), fl.transaction():
            tree.append(fl.SiLU())
            raise KeyError
        assert slots_of(tree) == ["Identity", "ReLU"]
        with fl.transaction():
            other.pop(0)
        raise RuntimeError
    assert fingerprint(tree, other) == before


def test_a_transaction_gives_back_contexts_that_an_edit_moved() -> None:
    tree, part = linears(1), fl.Chain(fl.UseContext("side", "data"))
    part.set_context("side", {"data": 1})
    with pytest.raises(RuntimeError), fl.transaction():
        tree.append(part)
        raise RuntimeError
    assert part(0) == 1
    assert not tree.contexts
