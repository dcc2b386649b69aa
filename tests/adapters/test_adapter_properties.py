"""Whatever adapters go in and out of whatever tree: base names never move, and in the end all is as it was."""

from typing import Any

import torch
from adapter_specimens import KINDS, WIDTH, lora_on, make_input, picture, randomize, randomize_own
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import nn

import refiners.fluxion.layers as fl
from refiners.adapters import Adapter

LEAVES = {
    "Linear": lambda: fl.Linear(WIDTH, WIDTH),
    "LayerNorm": lambda: fl.LayerNorm(WIDTH),
    "torch Linear": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "BatchNorm": lambda: nn.BatchNorm1d(WIDTH),
    "ReLU": fl.ReLU,
    "Identity": fl.Identity,
}
COMBINATORS: dict[str, Any] = {"Chain": fl.Chain, "Residual": fl.Residual, "Sum": fl.Sum}

# a tree is the name of a leaf, or (name of a combinator, trees)
trees = st.recursive(
    st.sampled_from(list(LEAVES)),
    lambda inner: st.tuples(st.sampled_from(list(COMBINATORS)), st.lists(inner, min_size=1, max_size=3)),
    max_leaves=8,
)
models = st.tuples(st.sampled_from(["Chain", "Residual"]), st.lists(trees, min_size=1, max_size=3))
STEPS = ["put", "put", "put", "build", "inject", "eject"]
moves = st.lists(st.tuples(st.sampled_from(STEPS), *[st.integers(0, 10**6)] * 2), min_size=3, max_size=14)
thorough = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def build(tree: Any) -> Any:
    if isinstance(tree, str):
        return LEAVES[tree]()
    kind, children = tree
    return COMBINATORS[kind](*map(build, children))


def build_model(tree: Any) -> fl.Chain:
    torch.manual_seed(0)
    model = build(tree)
    randomize(model)
    return model.eval()


def places(root: nn.Module) -> list[Any]:
    """All modules that an adapter may go on: the root, and any leaf, chain or adapter that sits in a chain below it."""
    held = [child for chain in root.modules() if isinstance(chain, fl.Chain) for child in chain.children()]
    return [module for module in dict.fromkeys([root, *held]) if not isinstance(module, fl.Return)]


def make_adapter(target: Any, which: int) -> Any:
    base = target.base if isinstance(target, Adapter) else target
    makers: list[Any] = [*KINDS.values(), *([lora_on] if isinstance(base, nn.Linear) else [])]
    adapter = makers[which % len(makers)](target)
    randomize_own(adapter)
    return adapter.eval()


class Base:
    """What a model was before any adapter, to compare with at any moment."""

    def __init__(self, model: fl.Chain, x: torch.Tensor) -> None:
        self.model, self.x = model, x
        self.picture = picture(model)
        self.keys = list(model.state_dict())
        self.tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        self.modules = dict(model.named_modules())
        self.output = model(x)

    def assert_names_hold(self) -> None:
        root = self.model.root
        saved = root.state_dict()
        assert [key for key in saved if key in self.tensors] == self.keys
        assert all(saved[key].data_ptr() == place for key, place in self.tensors.items())
        parameters, buffers = dict(root.named_parameters()), dict(root.named_buffers())
        assert parameters.keys() <= saved.keys() <= parameters.keys() | buffers.keys()
        for name, tensor in {**parameters, **buffers}.items():
            owner, _, last = name.rpartition(".")
            assert getattr(root.get_submodule(owner), last) is tensor, name
        modules = dict(root.named_modules())
        assert len(modules) == len(list(root.modules()))
        assert all(modules[name] is module for name, module in self.modules.items())
        root.load_state_dict(saved, strict=True)
        root.load_state_dict({key: saved[key] for key in self.keys}, strict=True)

    def assert_restored(self) -> None:
        assert self.model.parent is None
        assert picture(self.model) == self.picture
        assert torch.equal(self.model(self.x), self.output)


def move(model: fl.Chain, waiting: list[Any], going: tuple[str, int, int]) -> None:
    """Put an adapter on some module; or build one that waits, inject one of those, or eject one."""
    kind, which, where = going
    injected = [module for module in model.root.modules() if isinstance(module, Adapter)]
    if kind in ("put", "build"):
        candidates = places(model.root)
        adapter = make_adapter(candidates[where % len(candidates)], which)
        waiting.append(adapter) if kind == "build" else adapter.inject()
    elif kind == "inject" and waiting:
        adapter = waiting.pop(which % len(waiting))
        if adapter.target in set(model.root.modules()):
            event(f"inject {type(adapter).__name__}")
            adapter.inject()
    elif kind == "eject" and injected:
        event("eject")
        injected[which % len(injected)].eject()


@thorough
@given(models, moves, st.randoms(use_true_random=False))
def test_after_any_moves_of_adapters_ejecting_all_restores_everything(tree: Any, going: Any, random: Any) -> None:
    model = build_model(tree)
    base, waiting = Base(model, make_input()), list[Any]()
    for one in going:
        move(model, waiting, one)
        base.assert_names_hold()
        assert model.root(base.x).shape == base.output.shape
    injected = [module for module in model.root.modules() if isinstance(module, Adapter)]
    random.shuffle(injected)
    for adapter in injected:
        adapter.eject()
        base.assert_names_hold()
    base.assert_restored()


@thorough
@given(models, st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=6), st.data())
def test_adapters_of_any_modules_are_ejected_in_any_order(tree: Any, chosen: Any, data: st.DataObject) -> None:
    model = build_model(tree)
    base = Base(model, make_input())
    adapters: list[Any] = []
    for which, where in chosen:
        candidates = places(model.root)
        adapters.append(make_adapter(candidates[where % len(candidates)], which).inject())
    event(f"{len(adapters)} adapters")
    base.assert_names_hold()
    for adapter in data.draw(st.permutations(adapters)):
        adapter.eject()
        base.assert_names_hold()
    base.assert_restored()


@thorough
@given(models, moves)
def test_a_transaction_that_fails_takes_back_any_moves(tree: Any, going: Any) -> None:
    model = build_model(tree)
    base, waiting = Base(model, make_input()), list[Any]()
    for one in going[: len(going) // 2]:
        move(model, waiting, one)
    before, output = picture(model.root), model.root(base.x)
    injected = [module for module in model.root.modules() if isinstance(module, Adapter)]
    try:
        with fl.transaction():
            for one in going[len(going) // 2 :]:
                move(model, waiting, one)
            raise LookupError("no weights")
    except LookupError:
        pass
    assert picture(model.root) == before
    assert torch.equal(model.root(base.x), output)
    for adapter in reversed(injected):
        adapter.eject()
    base.assert_restored()


@thorough
@given(models, moves, st.booleans())
def test_a_structural_copy_of_any_adapted_tree_is_equal_and_apart(tree: Any, going: Any, eject_the_copy: bool) -> None:
    model = build_model(tree)
    base, waiting = Base(model, make_input()), list[Any]()
    for one in going:
        move(model, waiting, one)
    root = model.root
    clone = root.structural_copy()
    assert list(clone.state_dict()) == list(root.state_dict())
    assert torch.equal(clone(base.x), root(base.x))
    edited, kept = (clone, root) if eject_the_copy else (root, clone)
    before, output = picture(kept), kept(base.x)
    (top,) = [edited] if not isinstance(edited, Adapter) else [edited.base]
    for adapter in [module for module in edited.modules() if isinstance(module, Adapter)]:
        adapter.eject()
    assert torch.equal(top(base.x), base.output)
    assert list(top.state_dict()) == base.keys
    assert picture(kept) == before
    assert torch.equal(kept(base.x), output)


@thorough
@given(models, moves)
def test_a_checkpoint_of_any_adapted_tree_loads_into_a_like_one(tree: Any, going: Any) -> None:
    source, model, x = build_model(tree), build_model(tree), make_input()
    for one in (source, model):
        waiting = list[Any]()
        for step in going:
            move(one, waiting, step)
    randomize(source.root)
    model.root.load_state_dict(source.root.state_dict(), strict=True)
    assert torch.equal(model.root(x), source.root(x))
