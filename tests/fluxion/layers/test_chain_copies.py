"""Copies, files, hooks and torch's own tools: what a Chain shares, what it keeps for itself, and how it travels."""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.modules import module as torch_module

import refiners.fluxion.layers as fl
from refiners.fluxion.context import Contexts


class WithAttributes(fl.Chain):
    """A chain with values of its own, and a context that every call starts with."""

    def __init__(self) -> None:
        self.width = 4
        super().__init__(fl.Linear(4, 4), fl.Sum(fl.Identity(), fl.UseContext("side", "data").compose(double)))
        self.notes = ["first"]

    def init_context(self) -> Contexts:
        return {"side": {"data": torch.ones(1)}}


def double(x: Any) -> Any:
    return x * 2


def triple_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 3


def halve_input(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] / 2,)


def vectors() -> tuple[Tensor, ...]:
    return (torch.linspace(-1, 1, 8).view(2, 4),)


def pictures() -> tuple[Tensor, ...]:
    return (torch.linspace(-1, 1, 2 * 4 * 8 * 8).view(2, 4, 8, 8),)


TREES: dict[str, tuple[Callable[[], fl.Chain], Callable[[], tuple[Tensor, ...]]]] = {
    "plain": (lambda: fl.Chain(nn.Linear(4, 4), fl.Residual(fl.Linear(4, 4), fl.Chain(fl.ReLU()))), vectors),
    "attributes": (WithAttributes, vectors),
    "combinators": (
        lambda: fl.Chain(
            fl.Passthrough(fl.SetContext("seen", "x")),
            fl.Parallel(fl.Linear(4, 4), fl.Identity()),
            fl.Distribute(fl.Linear(4, 4), fl.SiLU()),
            fl.Concatenate(fl.GetArg(0), fl.GetArg(1), dim=1),
            fl.Matmul(fl.Linear(8, 8), fl.Chain(fl.UseContext("seen", "x").compose(transposed))),
        ),
        lambda: (torch.linspace(-1, 1, 32).view(8, 4),),
    ),
    "sampling": (lambda: fl.Chain(fl.Downsample(4, 2), fl.Residual(fl.Conv2d(4, 4, 1)), fl.Upsample(4)), pictures),
    "attention": (lambda: fl.Chain(fl.SelfAttention2d(4, num_heads=2)), pictures),
    "return": (lambda: fl.Chain(fl.Linear(4, 4), fl.Return(), fl.Linear(9, 9)), vectors),
}

each_tree = pytest.mark.parametrize(("build", "inputs"), TREES.values(), ids=TREES.keys())


def transposed(x: Tensor) -> Tensor:
    return torch.cat([x.T, x.T])


def same_outputs(first: nn.Module, second: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    return torch.equal(first(*inputs), second(*inputs))


def parents_are_right(tree: fl.Chain) -> bool:
    return all(
        getattr(child, "parent", node) is node
        for node in tree.modules()
        if isinstance(node, fl.Chain)
        for child in node
    )


# --- structural copies ------------------------------------------------------------------------------------------------


@each_tree
def test_a_structural_copy_has_new_inner_nodes_and_the_same_leaves(build: Any, inputs: Any) -> None:
    tree = build()
    clone = tree.structural_copy()
    theirs, ours = dict(tree.named_modules()), dict(clone.named_modules())
    assert list(theirs) == list(ours)
    for name, module in theirs.items():
        is_inner = isinstance(module, fl.ContextModule)
        assert type(ours[name]) is type(module)
        assert (ours[name] is not module) if is_inner else (ours[name] is module)
    assert all(a is b for a, b in zip(tree.parameters(), clone.parameters(), strict=True))
    assert parents_are_right(tree) and parents_are_right(clone) and clone.parent is None
    assert same_outputs(tree, clone, inputs())
    assert same_outputs(tree, clone, inputs())  # contexts of the first calls are gone


@each_tree
@pytest.mark.parametrize("direction", ["copy", "original"])
def test_edits_never_leak_between_a_tree_and_its_copy(build: Any, inputs: Any, direction: str) -> None:
    tree = build()
    clone = tree.structural_copy()
    edited, kept = (clone, tree) if direction == "copy" else (tree, clone)
    keys, nodes, output = list(kept.state_dict()), list(kept.modules()), kept(*inputs())
    for node in [module for module in edited.modules() if isinstance(module, fl.Chain)]:
        node.insert(0, fl.Identity())
        node.pop()
        node.append(fl.Chain())
    assert list(kept.state_dict()) == keys and list(kept.modules()) == nodes
    assert torch.equal(kept(*inputs()), output)
    assert parents_are_right(kept) and parents_are_right(edited)


def test_a_copy_has_its_own_values_contexts_and_composed_functions() -> None:
    tree = WithAttributes()
    tree.set_context("side", {"data": torch.zeros(1)})
    clone = tree.structural_copy()
    clone.notes.append("second")
    clone.Sum.UseContext.compose(double)
    clone.set_context("side", {"more": 1})
    assert (tree.notes, clone.width) == (["first"], 4)
    assert len(tree.Sum.UseContext.functions) == 1
    assert tree.contexts["side"] == {"data": torch.zeros(1)}
    assert clone.contexts["side"] == {"data": torch.ones(1), "more": 1}


def test_a_copy_of_a_subtree_is_a_root() -> None:
    tree = fl.Chain(fl.Chain(fl.Chain(fl.Linear(4, 4))))
    clone = tree.Chain.structural_copy()
    assert clone.parent is None and clone.root is clone
    assert tree.Chain.parent is tree and clone.Chain.parent is clone


@pytest.mark.usefixtures("fresh_compiler")
def test_a_copy_of_a_compiled_tree_runs_its_own_layers() -> None:
    tree = fl.Chain(fl.Linear(4, 4), fl.Identity())
    tree.compile(backend="eager")
    clone = tree.structural_copy()
    clone.append(fl.Multiply(0.0))
    assert tree(*vectors()).any() and not clone(*vectors()).any()


def test_a_shallow_copy_of_a_chain_leaves_the_original_its_children() -> None:
    tree = fl.Chain(fl.Chain(fl.Linear(4, 4)))
    clone = copy.copy(tree)
    clone.append(fl.ReLU())
    assert len(tree) == 1 and parents_are_right(tree)
    assert clone[0][0].weight is tree[0][0].weight


# --- slices and sums --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "derive", [lambda tree: tree[:2], lambda tree: tree + tree, lambda tree: tree + nn.Sequential(fl.ReLU())]
)
def test_slices_and_sums_leave_their_operands_untouched(derive: Callable[[fl.Chain], fl.Chain]) -> None:
    tree = fl.Chain(fl.Linear(4, 4), fl.Residual(fl.Linear(4, 4)), fl.SiLU())
    keys, nodes, output = list(tree.state_dict()), list(tree.modules()), tree(*vectors())
    derived = derive(tree)
    assert derived[0] is tree[0] and derived[1] is not tree[1] and derived[1][0] is tree[1][0]
    derived[1].append(fl.Multiply(0.0))
    derived.pop(0)
    assert list(tree.state_dict()) == keys and list(tree.modules()) == nodes
    assert torch.equal(tree(*vectors()), output)
    assert parents_are_right(tree) and parents_are_right(derived)


# --- deep copies and pickles ------------------------------------------------------------------------------------------


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


@each_tree
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_deep_copy_and_a_pickle_compute_the_same_with_weights_of_their_own(
    build: Any, inputs: Any, duplicate: Callable[[Any], Any]
) -> None:
    tree = build()
    tree.set_context("leftover", {"data": 1})
    clone = duplicate(tree)
    assert list(clone.state_dict()) == list(tree.state_dict())
    assert not {id(t) for t in clone.parameters()} & {id(t) for t in tree.parameters()}
    assert parents_are_right(clone) and "leftover" not in clone.contexts
    output = tree(*inputs())
    assert torch.equal(clone(*inputs()), output)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.fill_(0.1)
    clone.append(fl.Identity())
    assert torch.equal(tree(*inputs()), output)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("path", ["Chain", "Chain.Sum.UseContext"])
def test_a_subtree_does_not_drag_its_parent_along(duplicate: Callable[[Any], Any], path: str) -> None:
    tree = fl.Chain(fl.Linear(512, 512), fl.Chain(fl.Sum(fl.Identity(), fl.UseContext("side", "data"))))
    clone = duplicate(tree.get_submodule(path))
    assert clone.parent is None
    assert len(pickle.dumps(clone)) < 10_000
    assert fl.Chain(clone)[0] is clone and parents_are_right(tree)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("build", [fl.Chain, lambda: fl.Linear(4, 4), lambda: fl.UseContext("a", "b")])
def test_what_was_compiled_can_still_be_copied(duplicate: Callable[[Any], Any], build: Callable[[], nn.Module]) -> None:
    module = build()
    module.compile(backend="eager")
    assert type(duplicate(module)) is type(module)


# --- files ------------------------------------------------------------------------------------------------------------


@each_tree
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_saved_weights_load_into_a_new_tree(build: Any, inputs: Any, kind: str, tmp_path: Path) -> None:
    tree, other, path = build(), build(), tmp_path / "weights"
    assert not same_outputs(tree, other, inputs())
    if kind == "torch":
        torch.save(tree.state_dict(), path)
        other.load_state_dict(torch.load(path, weights_only=True))
    else:
        save_file(tree.state_dict(), path)
        assert other.load_from_safetensors(path) is other
    assert same_outputs(tree, other, inputs())


def test_loading_a_file_that_does_not_fit_is_refused_unless_not_strict(tmp_path: Path) -> None:
    save_file({"Linear.weight": torch.zeros(4, 4), "Strange.weight": torch.zeros(1)}, tmp_path / "part")
    tree = fl.Chain(fl.Linear(4, 4))
    with pytest.raises(RuntimeError, match=r"Linear\.bias"):
        tree.load_from_safetensors(tmp_path / "part")
    tree.load_from_safetensors(tmp_path / "part", strict=False)
    assert not tree.Linear.weight.any() and tree.Linear.bias.any()
    save_file({"weight": torch.ones(4, 4), "bias": torch.ones(4)}, tmp_path / "leaf")
    assert tree.Linear.load_from_safetensors(tmp_path / "leaf").weight.all()


def test_assignment_moves_a_meta_tree_onto_real_tensors() -> None:
    source = TREES["plain"][0]()
    with torch.device("meta"):
        tree = TREES["plain"][0]()
    tree.load_state_dict(source.state_dict(), assign=True)
    assert same_outputs(tree, source, vectors())


# --- hooks ------------------------------------------------------------------------------------------------------------


def hooked(kind: str, module: nn.Module | None, hook: Callable[..., Any]) -> Any:
    """Register on one module, or on all for None, and return the handle."""
    owner: Any = torch_module if module is None else module
    return getattr(owner, f"register_module_{kind}_hook" if module is None else f"register_{kind}_hook")(hook)


@pytest.mark.parametrize("slot", ["", "Linear", "Residual", "Residual.Linear", "Residual.Chain"])
@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_hooks_fire_once_a_call_until_removed(slot: str, kind: str) -> None:
    tree, calls = TREES["plain"][0](), []
    module = tree.get_submodule(slot)
    handle = hooked(kind, module, lambda owner, *_: calls.append(owner))
    x = vectors()[0].requires_grad_()
    for _ in range(2):
        tree(x).sum().backward()
    assert calls == [module, module]
    handle.remove()
    tree(x).sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_global_hooks_see_every_module_once(kind: str) -> None:
    tree, calls = TREES["plain"][0](), []
    handle = hooked(kind, None, lambda owner, *_: calls.append(owner))
    x = vectors()[0].requires_grad_()
    try:
        tree(x).sum().backward()
    finally:
        handle.remove()
    assert sorted(map(id, calls)) == sorted(map(id, tree.modules()))
    tree(x).sum().backward()
    assert len(calls) == len(list(tree.modules()))


@pytest.mark.parametrize("slot", ["", "Residual.Chain", "Residual.Chain.ReLU"])
def test_hooks_change_what_goes_in_and_comes_out(slot: str) -> None:
    tree = fl.Chain(fl.Residual(fl.Chain(fl.ReLU())))
    module = tree.get_submodule(slot)
    (x,) = vectors()
    plain = {"": tree, "Residual.Chain": tree[0][0], "Residual.Chain.ReLU": tree[0][0]}[slot]
    expected = plain(x / 2) * 3 + (0 if slot == "" else x)
    module.register_forward_pre_hook(halve_input)
    module.register_forward_hook(triple_output)
    assert torch.equal(tree(x), expected)


def test_a_hook_on_a_chain_sees_contexts_before_they_go() -> None:
    tree, seen = WithAttributes(), []
    tree.set_context("side", {"data": torch.zeros(1)})
    tree.register_forward_hook(lambda module, *_: seen.append(module.contexts["side"]["data"]))
    tree(*vectors())
    assert torch.equal(seen[0], torch.zeros(1))
    assert tree._contexts is None


# --- torch's tools ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["plain", "attributes", "return", "attention"])
def test_compile_in_place_computes_the_same_and_follows_edits(name: str) -> None:
    build, inputs = TREES[name]
    tree = build()
    reference = tree.structural_copy()
    tree.compile(backend=(counter := CompileCounter()), fullgraph=True)
    assert same_outputs(tree, reference, inputs()) and counter.frame_count == 1
    tree.insert(0, fl.Multiply(0.5))
    reference.insert(0, fl.Multiply(0.5))
    assert same_outputs(tree, reference, inputs())


@pytest.mark.usefixtures("fresh_compiler")
def test_more_trees_compile_than_dynamo_keeps_versions_of_one_function() -> None:
    for count in range(1, 11):
        tree = fl.Chain(fl.Identity() for _ in range(count))
        tree.compile(backend="eager", fullgraph=True)
        assert tree(torch.ones(2)).sum() == 2


@pytest.mark.parametrize("name", ["plain", "attributes", "combinators", "return"])
def test_functional_call_runs_on_other_weights_and_leaves_ours(name: str) -> None:
    build, inputs = TREES[name]
    tree, other = build(), build()
    weights, output = {key: value.detach() for key, value in other.state_dict().items()}, tree(*inputs())
    assert torch.equal(torch.func.functional_call(tree, weights, inputs()), other(*inputs()))
    assert torch.equal(tree(*inputs()), output)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", ["plain", "combinators", "return"])
def test_a_traced_tree_computes_the_same_on_new_inputs_and_weights(name: str) -> None:
    build, inputs = TREES[name]
    tree = build()
    traced = torch.jit.trace(tree, inputs())
    assert list(traced.state_dict()) == list(tree.state_dict())
    with torch.no_grad():
        for parameter in tree.parameters():
            parameter.add_(0.1)
    assert same_outputs(traced, tree, (inputs()[0] * 2,))


class Conditioned(nn.Module):
    """A model to export: what a chain takes through a context is an input of it."""

    def __init__(self, tree: fl.Chain) -> None:
        super().__init__()
        self.tree = tree

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        self.tree.set_context("side", {"data": data})
        return self.tree(x)


@pytest.mark.parametrize("name", ["plain", "combinators", "return"])
def test_an_exported_tree_computes_the_same(name: str) -> None:
    build, inputs = TREES[name]
    tree = build()
    program = torch.export.export(tree, inputs())
    assert set(program.state_dict) == set(tree.state_dict())
    assert same_outputs(program.module(), tree, (inputs()[0] * 2,))


def test_an_exported_wrapper_takes_the_context_as_an_input() -> None:
    model = Conditioned(WithAttributes())
    program = torch.export.export(model, (*vectors(), torch.ones(4)))
    new = (vectors()[0] * 2, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert same_outputs(program.module(), model, new)
    assert not torch.equal(program.module()(*new), model.tree(new[0]))  # which runs on its initial context
