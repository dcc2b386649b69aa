"""What holds for every tree and every sequence of edits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import refiners.fluxion.layers as fl

MANY = settings(max_examples=50, deadline=None, derandomize=True)
FEW = settings(max_examples=6, deadline=None, derandomize=True)

LEAVES: list[Callable[[], nn.Module]] = [
    lambda: fl.Linear(4, 4),
    lambda: nn.Linear(4, 4),
    fl.ReLU,
    nn.Identity,
    fl.Identity,
]


class TooMuchError(Exception):
    """Raised on purpose, half-way through some edits."""


# --- random trees and edits -------------------------------------------------------------------------------------------


def spread_and_added(*branches: nn.Module) -> fl.Chain:
    """A tuple on the way: Parallel gives it, and Sum adds what its children pick from it."""
    return fl.Chain(fl.Parallel(*branches), fl.Sum(*(fl.GetArg(index) for index in range(len(branches)))))


Node = Callable[[], nn.Module]


def inner_nodes(children: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    kinds = st.sampled_from([fl.Chain, fl.Residual, fl.Sum, spread_and_added])
    return st.tuples(kinds, st.lists(children, min_size=1, max_size=4)).map(built)


def built(kind_and_children: tuple[Callable[..., nn.Module], list[Node]]) -> Node:
    kind, children = kind_and_children
    return lambda: kind(*(child() for child in children))


nodes = st.recursive(st.sampled_from(LEAVES), inner_nodes, max_leaves=12)
newcomers = nodes | st.just(fl.Return)
builders = st.lists(nodes, min_size=1, max_size=4).map(lambda children: built((fl.Chain, children)))


@st.composite
def trees(draw: st.DrawFn) -> fl.Chain:
    torch.manual_seed(draw(st.integers(0, 1000)))
    tree = draw(builders)()
    assert isinstance(tree, fl.Chain)
    return tree


def x() -> Tensor:
    return torch.linspace(-1, 1, 8).view(2, 4)


def chains_of(tree: fl.Chain) -> list[fl.Chain]:
    return [module for module in tree.modules() if isinstance(module, fl.Chain)]


def edit_once(tree: fl.Chain, draw: Callable[[Any], Any]) -> nn.Module | None:
    """One random edit that is allowed, somewhere in the tree. Returns the child that it put elsewhere, if any."""
    chain = draw(st.sampled_from(chains_of(tree)))
    index = draw(st.integers(0, len(chain)))
    new = draw(newcomers)()
    if index == len(chain):
        chain.append(new)
        return None
    kind = draw(st.sampled_from(["insert", "pop", "remove", "replace", "setattr", "delattr", "wrap", "move"]))
    child, slot = chain[index], list(chain._modules)[index]
    if kind == "insert":
        chain.insert(draw(st.sampled_from([index, index - len(chain) - 1])), new)
    elif kind == "pop":
        assert chain.pop(index) is child
    elif kind == "remove":
        chain.remove(child)
    elif kind == "replace":
        chain.replace(child, new)
    elif kind == "setattr":
        setattr(chain, slot, new)
    elif kind == "delattr":
        delattr(chain, slot)
    elif kind == "wrap":
        chain.replace(child, gap := fl.Identity())
        chain.replace(gap, fl.Residual(child))
    else:
        chain.remove(child)
        draw(st.sampled_from(chains_of(tree))).append(child)
        return child
    return None


def check_invariants(tree: fl.Chain) -> None:
    seen = list(tree.modules())
    for chain in chains_of(tree):
        children = list(chain)
        ends = [index for index, child in enumerate(children) if isinstance(child, fl.Return)]
        assert chain._plan == tuple(children[: ends[0] if ends else None])
        assert list(chain._modules.values()) == children
        for child in children:
            assert getattr(child, "parent", chain) is chain
            assert sum(child is module for module in seen) == 1
            assert chain.slot_of(child) in chain._modules
    assert list(tree.state_dict()) == [name for name, _ in tree.named_parameters()]
    assert tree.parent is None


def fingerprint(tree: fl.Chain) -> list[Any]:
    modules = list(tree.modules())
    outputs = run(tree)
    return [
        list(tree.state_dict()),
        list(tree.named_modules()),
        [getattr(module, "parent", None) for module in modules],
        [getattr(module, "_plan", None) for module in modules],
        outputs,
    ]


def run(tree: fl.Chain) -> Any:
    """What the tree gives, as numbers, or the words of its error: an edit may leave a Sum without children."""
    try:
        return tree(x()).tolist()
    except Exception as error:
        return str(error)


# --- files and copies -------------------------------------------------------------------------------------------------


@MANY
@given(builders)
def test_state_dicts_round_trip(build: Callable[[], fl.Chain]) -> None:
    tree, other = build(), build()
    state = tree.state_dict()
    assert list(state) == [name for name, _ in tree.named_parameters()] == list(other.state_dict())
    other.load_state_dict({name: tensor.clone() for name, tensor in reversed(state.items())})
    assert torch.equal(other(x()), tree(x()))
    if state:
        missing = dict(list(state.items())[1:])
        with pytest.raises(RuntimeError, match="Missing key"):
            other.load_state_dict(missing)


@MANY
@given(trees())
def test_structural_copies_share_leaves_and_compute_the_same(tree: fl.Chain) -> None:
    clone = tree.structural_copy()
    theirs, ours = dict(tree.named_modules()), dict(clone.named_modules())
    assert list(theirs) == list(ours)
    assert all((theirs[name] is ours[name]) != isinstance(theirs[name], fl.Chain) for name in theirs)
    assert torch.equal(clone(x()), tree(x()))
    check_invariants(tree)
    check_invariants(clone)


@MANY
@given(trees(), st.data(), st.booleans())
def test_random_edits_never_leak_between_copies(tree: fl.Chain, data: st.DataObject, edit_the_copy: bool) -> None:
    clone = tree.structural_copy()
    edited, kept = (clone, tree) if edit_the_copy else (tree, clone)
    before = fingerprint(kept)
    for _ in range(data.draw(st.integers(1, 5))):
        edit_once(edited, data.draw)
    assert fingerprint(kept) == before
    check_invariants(kept)
    check_invariants(edited)


@MANY
@given(trees(), st.integers(-6, 6), st.integers(-6, 6))
def test_slices_and_sums_are_those_of_lists(tree: fl.Chain, start: int, stop: int) -> None:
    before = fingerprint(tree)
    part, rest = tree[:stop], tree[stop:]
    assert len(tree[start:stop]) == len(list(tree)[start:stop])
    joined = part + rest
    assert [type(child) for child in joined] == [type(child) for child in tree]
    assert torch.equal(joined(x()), tree(x()))
    joined.pop()
    assert fingerprint(tree) == before


# --- edits ------------------------------------------------------------------------------------------------------------


@MANY
@given(trees(), st.data())
def test_any_sequence_of_edits_keeps_the_tree_sound(tree: fl.Chain, data: st.DataObject) -> None:
    check_invariants(tree)
    for _ in range(data.draw(st.integers(1, 8))):
        before = places(tree)
        moved = edit_once(tree, data.draw)
        check_invariants(tree)
        after = places(tree)
        for place, slot in after.items():
            assert before.get(place, slot) == slot or place[1] is moved
        assert after != before or moved is not None
        reference = tree.structural_copy()
        assert run(tree) == run(reference)


def places(tree: fl.Chain) -> dict[tuple[fl.Chain, nn.Module], str]:
    return {(chain, child): slot for chain in chains_of(tree) for slot, child in chain._modules.items()}


@MANY
@given(trees(), st.data())
def test_an_edit_that_raises_half_way_leaves_the_tree_as_it_was(tree: fl.Chain, data: st.DataObject) -> None:
    before = fingerprint(tree)
    other = fl.Chain(fl.Linear(4, 4), fl.Residual(fl.ReLU()))
    other_before = fingerprint(other)
    with pytest.raises(TooMuchError), fl.transaction():
        for _ in range(data.draw(st.integers(1, 6))):
            edit_once(tree, data.draw)
        if len(tree):
            other.replace(other[0], tree.pop())
        raise TooMuchError
    assert fingerprint(tree) == before
    assert fingerprint(other) == other_before
    check_invariants(tree)


@FEW
@given(trees(), st.data())
def test_a_refused_edit_leaves_the_tree_as_it_was(tree: fl.Chain, data: st.DataObject) -> None:
    before = fingerprint(tree)
    chain = data.draw(st.sampled_from(chains_of(tree)))
    deepest = chains_of(tree)[-1]
    taken = fl.Chain(fl.Linear(4, 4))
    with pytest.raises(ValueError, match="already sits"):
        chain.insert(0, taken[0])
    with pytest.raises(ValueError, match="below itself"):
        deepest.append(tree)
    with pytest.raises(TypeError):
        chain.append("text")  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        chain.insert(len(chain) + 1, fl.ReLU())
    assert fingerprint(tree) == before


# --- compiled ---------------------------------------------------------------------------------------------------------


@FEW
@given(trees())
def test_compiled_equals_eager(tree: fl.Chain) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(tree, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x()), tree(x()))
    tree.append(fl.Multiply(2.0, 1.0))
    assert torch.equal(compiled(x()), tree(x()))
