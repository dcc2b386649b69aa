"""Errors in a tree: they keep their type, and one note says where they happened, with what, and what does not fit."""

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.fluxion.context import ContextError


class OwnError(Exception):
    """An exception of a user, with an argument of its own."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


def raises(error: BaseException) -> fl.Lambda:
    def fail(*_: Any) -> Any:
        raise error

    return fl.Lambda(fail)


def caught(call: Callable[..., Any], *args: Any) -> BaseException:
    with pytest.raises(BaseException) as found:
        call(*args)
    return found.value


def note_of(error: BaseException) -> str:
    """The one note that an error carries."""
    (note,) = error.__notes__
    return note


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*shape, dtype=dtype)


# --- the type stays ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [OwnError, RuntimeError, torch.OutOfMemoryError, KeyError, StopIteration, ZeroDivisionError, NotImplementedError],
)
@pytest.mark.parametrize("depth", [0, 1, 7])
def test_the_very_same_exception_comes_out_with_one_note(kind: type[Exception], depth: int) -> None:
    error = kind(3)
    tree: fl.Chain = fl.Chain(fl.Identity(), raises(error))
    for _ in range(depth):
        tree = fl.Residual(tree)
    text = str(error)
    found = caught(tree, rows(2, 4))
    assert found is error and str(found) == text
    slots = ["Residual"] * depth + ["Chain", "Lambda"]
    assert note_of(found) == f"in the tree: {' > '.join(slots)}, called with ((2, 4) float32)"


def test_running_out_of_memory_can_be_caught_and_the_call_tried_again() -> None:
    calls = []

    def sometimes(x: Tensor) -> Tensor:
        calls.append(x.shape[0])
        if x.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    tree = fl.Chain(fl.Residual(fl.Lambda(sometimes)))
    try:
        output = tree(rows(4, 4))
    except torch.OutOfMemoryError:
        output = torch.cat([tree(part) for part in rows(4, 4).split(2)])
    assert torch.equal(output, rows(4, 4) * 2)
    assert calls == [4, 2, 2]


def test_what_came_into_a_failed_call_is_given_back_with_its_error() -> None:
    chain, x = fl.Chain(fl.Linear(4, 4), fl.Chain(fl.Linear(3, 3))), torch.randn(2, 4)
    place = weakref.ref(x)
    gc.disable()  # a circle of references would keep it until the next collection
    try:
        with suppress(RuntimeError):
            chain(x)
        del x
        assert place() is None
    finally:
        gc.enable()


def test_the_message_and_cause_of_an_error_of_torch_are_untouched() -> None:
    layer, x = fl.Linear(5, 4), rows(2, 4)
    plain = caught(nn.functional.linear, x, layer.weight, layer.bias)
    found = caught(fl.Chain(layer), x)
    assert type(found) is type(plain) is RuntimeError and str(found) == str(plain)
    assert found.__cause__ is None and found.__context__ is None


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_without_a_note(stop: type[BaseException]) -> None:
    tree = fl.Chain(fl.Residual(fl.UseContext("a", "b"), raises(stop())))
    tree.set_context("a", {"b": 1})
    found = caught(tree, rows(2, 4))
    assert type(found) is stop and not hasattr(found, "__notes__")
    assert tree._contexts is None


def test_notes_of_the_user_are_kept_in_front() -> None:
    error = OwnError(1)
    error.add_note("mine")
    found = caught(fl.Chain(fl.Chain(raises(error))), 1)
    assert found.__notes__ == ["mine", "in the tree: Chain > Chain > Lambda, called with (int)"]


# --- words for what does not fit --------------------------------------------------------------------------------------


MISFITS: list[tuple[nn.Module, Tensor, str]] = [
    (fl.Linear(5, 4), rows(2, 4), "Linear expects last dimension of size 5, but got 4"),
    (nn.Linear(5, 4), rows(3, 2, 4), "Linear expects last dimension of size 5, but got 4"),
    (fl.Conv2d(3, 4, 3), rows(1, 5, 8, 8), "Conv2d expects channels (dimension 1) of size 3, but got 5"),
    (
        fl.ConvTranspose2d(3, 4, 3),
        rows(1, 5, 8, 8),
        "ConvTranspose2d expects channels (dimension 1) of size 3, but got 5",
    ),
    (fl.Linear(4, 4), rows(2, 4, dtype=torch.float16), "the weights are float32, the input is float16"),
    (fl.Linear(4, 4, dtype=torch.float64), rows(2, 4), "the weights are float64, the input is float32"),
    (fl.Conv2d(3, 4, 3), rows(1, 3, 8, 8, dtype=torch.float64), "the weights are float32, the input is float64"),
]


@pytest.mark.parametrize(("layer", "x", "words"), MISFITS)
def test_the_note_says_in_words_what_does_not_fit(layer: nn.Module, x: Tensor, words: str) -> None:
    found = caught(fl.Chain(fl.Residual(fl.Identity(), layer)), x)
    shape, dtype = tuple(x.shape), str(x.dtype).removeprefix("torch.")
    slot = f"Chain > Residual > {type(layer).__name__}"
    assert note_of(found) == f"in the tree: {slot}, called with ({shape} {dtype}): {words}"


def test_devices_that_differ_are_named() -> None:
    found = caught(fl.Chain(fl.Linear(4, 4, device="meta")), rows(2, 4))
    assert note_of(found).endswith("the weights are on meta, the input is on cpu")


def test_the_path_names_slots_not_classes() -> None:
    tree = fl.Chain(fl.Linear(5, 5), fl.Residual(fl.Linear(5, 4), fl.Linear(4, 4), fl.Linear(6, 5)))
    start = "in the tree: Chain > Residual > Linear_3, called with ((2, 4) float32): "
    assert note_of(caught(tree, rows(2, 5))).startswith(start)


@pytest.mark.parametrize("x", [torch.tensor(1.0), torch.tensor(1)])
def test_a_number_in_place_of_a_batch_is_torchs_error(x: Tensor) -> None:
    layer = fl.Linear(4, 4)
    plain = caught(nn.functional.linear, x, layer.weight, layer.bias)
    found = caught(fl.Chain(layer), x)
    assert type(found) is type(plain) and str(found) == str(plain)
    assert "called with (() " in note_of(found)


def test_the_channels_of_a_picture_without_a_batch_are_not_blamed_for_another_error() -> None:
    found = caught(fl.Chain(fl.Conv2d(3, 4, 3)), rows(3, 8, 8, dtype=torch.float64))
    assert note_of(found).endswith("the weights are float32, the input is float64")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "()"),
        ((1.5, None, "text"), "(float, NoneType, str)"),
        (([rows(2), 3], {"a": 1}), "(list[(2,) float32, int], dict)"),
        ((rows(2, dtype=torch.bfloat16).to("meta"),), "((2,) bfloat16 meta)"),
        ((rows(0, 3, dtype=torch.int64),), "((0, 3) int64)"),
    ],
)
def test_inputs_of_all_kinds_are_described(args: tuple[Any, ...], words: str) -> None:
    found = caught(fl.Chain(raises(OwnError(1))), *args)
    assert note_of(found) == f"in the tree: Chain > Lambda, called with {words}"


# --- from everywhere --------------------------------------------------------------------------------------------------


def test_a_subtree_that_is_called_directly_starts_the_path() -> None:
    tree = fl.Chain(fl.Identity(), fl.Chain(fl.Residual(fl.Linear(5, 5))))
    assert "in the tree: Chain > Residual > Linear, called" in note_of(caught(tree.Chain, rows(2, 4)))
    assert "in the tree: Residual > Linear, called" in note_of(caught(tree.Chain.Residual, rows(2, 4)))
    assert "in the tree: Linear, called" in note_of(caught(tree.Chain.Residual.Linear, rows(2, 4)))


def test_a_tree_called_inside_another_is_one_way() -> None:
    inner = fl.Sum(fl.Identity(), fl.Linear(5, 5))
    outer = fl.Chain(fl.Lambda(lambda x: inner(x)))
    assert "in the tree: Chain > Lambda > Sum > Linear, called" in note_of(caught(outer, rows(2, 4)))


def test_an_error_that_was_handled_inside_leaves_no_trace() -> None:
    inner = fl.Chain(fl.Linear(5, 5))

    def try_inner(x: Tensor) -> Tensor:
        try:
            return inner(x)
        except RuntimeError:
            raise OwnError(2) from None

    found = caught(fl.Chain(fl.Lambda(try_inner)), rows(2, 4))
    assert type(found) is OwnError
    assert note_of(found) == "in the tree: Chain > Lambda, called with ((2, 4) float32)"


HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("slots", [[""], ["Residual"], ["Residual.Linear"], ["", "Residual", "Residual.Linear"]])
def test_the_note_is_the_same_under_hooks(kind: str, slots: list[str]) -> None:
    tree = fl.Chain(fl.Residual(fl.Linear(5, 5)))
    for slot in slots:
        getattr(tree.get_submodule(slot), kind)(lambda *_: None)
    expected = "in the tree: Chain > Residual > Linear, called with ((2, 4) float32): Linear expects last dimension"
    assert note_of(caught(tree, rows(2, 4))).startswith(expected)


@pytest.mark.parametrize("kind", HOOKS[:2])
def test_an_error_in_a_hook_is_placed_at_the_module_of_the_hook(kind: str) -> None:
    def fail(*_: Any) -> None:
        raise OwnError(4)

    tree = fl.Chain(fl.Residual(fl.Linear(4, 4)), fl.ReLU())
    getattr(tree.Residual.Linear, kind)(fail)
    assert "in the tree: Chain > Residual > Linear, called" in note_of(caught(tree, rows(2, 4)))


def test_the_way_leads_through_foreign_modules() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = fl.Chain(nn.ReLU(), fl.Linear(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    tree = fl.Chain(fl.Identity(), nn.Sequential(nn.Identity(), Foreign()))
    found = caught(tree, rows(2, 4))
    assert "in the tree: Chain > Sequential > 1 > inner > Linear, called" in note_of(found)
    assert "in the tree: Chain > Linear, called" in note_of(caught(Foreign(), rows(2, 4)))


def test_a_plain_torch_leaf_is_found_too() -> None:
    tree = fl.Chain(nn.Linear(4, 4), fl.Residual(nn.Linear(5, 5)))
    found = note_of(caught(tree, rows(2, 4)))
    assert found.startswith("in the tree: Chain > Residual > Linear, called with ((2, 4) float32): Linear expects")


def test_an_error_of_a_combinator_is_placed_at_the_combinator() -> None:
    found = caught(fl.Chain(fl.Parallel(fl.Identity(), fl.Identity()), fl.Distribute(fl.Identity())), rows(2, 4))
    assert type(found) is ValueError
    assert note_of(found).startswith("in the tree: Chain > Distribute, called with ((2, 4) float32, (2, 4) float32)")


# --- afterwards -------------------------------------------------------------------------------------------------------


def test_a_missing_context_says_what_is_set_and_where() -> None:
    tree = fl.Chain(fl.Residual(fl.UseContext("text", "tokens")))
    tree.set_context("other", {"key": 1})
    found = caught(tree, rows(2, 4))
    assert isinstance(found, ContextError) and "no context 'text' at Chain (set: 'other')" in str(found)
    assert "Chain > Residual > UseContext" in note_of(found)


@pytest.mark.parametrize("hooked", [False, True])
def test_contexts_are_gone_after_an_error_and_the_tree_runs_again(hooked: bool) -> None:
    tree = fl.Chain(fl.Residual(fl.SetContext("seen", "x"), fl.Linear(4, 4), fl.UseContext("side", "data")))
    if hooked:
        tree.register_forward_hook(lambda *_: None)
    tree.set_context("side", {"data": torch.ones(1)})
    assert type(caught(tree, rows(2, 5))) is RuntimeError
    assert not tree.contexts
    assert isinstance(caught(tree, rows(2, 4)), ContextError)
    tree.set_context("side", {"data": torch.ones(1)})
    assert torch.equal(tree(rows(2, 4)), rows(2, 4) * 2)


def test_an_error_in_a_subtree_leaves_the_contexts_of_the_root_for_its_call() -> None:
    tree = fl.Chain(fl.Chain(fl.Linear(4, 4), fl.UseContext("side", "data")))
    tree.set_context("side", {"data": 7})
    caught(tree.Chain, rows(2, 5))
    assert tree(rows(2, 4)) == 7
    assert not tree.contexts
