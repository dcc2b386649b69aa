"""Contexts: named side data that lives at the root of a tree for one call, and reaches every layer."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import refiners.fluxion.layers as fl
from refiners.fluxion.context import Context, ContextError, Contexts

X = torch.ones(1)


def nested(layer: nn.Module, depth: int = 4) -> fl.Chain:
    """The layer below `depth` chains."""
    return fl.Chain(layer if depth == 1 else nested(layer, depth - 1))


def reader(key: str = "text", context: str = "side") -> fl.UseContext:
    return fl.UseContext(context=context, key=key)


class Starts(fl.Chain):
    """A chain whose calls start with these contexts."""

    def __init__(self, contexts: Callable[[], Contexts], *layers: nn.Module) -> None:
        self.start = contexts
        super().__init__(*layers)

    def init_context(self) -> Contexts:
        return self.start()


# --- for one call -----------------------------------------------------------------------------------------------------


def test_what_is_set_before_a_call_is_read_in_it_and_gone_after_it() -> None:
    chain = nested(reader())
    chain.set_context("side", {"text": "hello"})
    assert chain.contexts == {"side": {"text": "hello"}}
    assert chain(X) == "hello"
    assert chain.contexts == {}
    with pytest.raises(ContextError):
        chain(X)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_contexts_are_gone_after_a_call_that_raises(error: type[BaseException]) -> None:
    def fail(_: Any) -> None:
        raise error

    chain = fl.Chain(fl.Chain(reader(), fl.Lambda(fail)))
    chain.set_context("side", {"text": 1})
    with pytest.raises(error):
        chain(X)
    assert chain.contexts == {}


def test_contexts_are_gone_after_a_call_with_hooks() -> None:
    chain = nested(reader())
    seen: list[Any] = []
    chain.register_forward_pre_hook(lambda module, inputs: chain.set_context("side", {"text": "from a hook"}))
    chain.register_forward_hook(lambda module, inputs, output: seen.append(chain.contexts["side"]["text"]))
    assert chain(X) == "from a hook"
    assert seen == ["from a hook"]
    assert chain.contexts == {}


def test_a_call_of_a_part_keeps_what_was_set_for_the_whole() -> None:
    chain = nested(reader())
    chain.set_context("side", {"text": "hello"})
    assert chain.Chain(X) == "hello"
    assert chain.layer(["Chain", "Chain", "Chain", "UseContext"])(X) == "hello"
    assert chain(X) == "hello"


def test_set_context_merges_keys_and_the_last_value_counts() -> None:
    chain = fl.Chain(fl.Parallel(reader("a"), reader("b"), reader("c", "other")))
    value = {"a": 1, "b": 2}
    chain.set_context("side", value)
    chain.set_context("side", {"b": 3})
    chain.set_context("other", {"c": 4})
    assert chain(X) == (1, 3, 4)
    assert value == {"a": 1, "b": 2}


def test_a_value_of_none_is_a_value() -> None:
    chain = fl.Chain(reader())
    chain.set_context("side", {"text": None})
    assert chain(X) is None


# --- one root ---------------------------------------------------------------------------------------------------------


def test_what_is_set_at_an_inner_chain_is_seen_from_the_root_and_the_other_way() -> None:
    root = nested(reader())
    inner = root.layer(["Chain", "Chain", "Chain"], fl.Chain)
    inner.set_context("side", {"text": "from within"})
    assert root.contexts is inner.contexts
    assert root.use_context("side") == {"text": "from within"}
    root.set_context("side", {"more": 1})
    assert inner.use_context("side") == {"text": "from within", "more": 1}
    assert inner.UseContext.use_context("side") is root.use_context("side")
    assert root(X) == "from within"
    assert inner.contexts == {}


def test_a_tree_put_into_a_bigger_one_gives_its_contexts_to_the_new_root() -> None:
    inner, sibling, root = nested(reader()), fl.Chain(reader("b")), fl.Chain(fl.Identity())
    inner.set_context("side", {"text": "early", "b": 0})
    sibling.set_context("side", {"b": 1})
    root.set_context("side", {"c": 2})
    root.append(inner)
    root.append(sibling)
    assert root.contexts == {"side": {"text": "early", "b": 1, "c": 2}}
    assert inner.contexts is root.contexts
    assert root.pop(1) is inner
    assert inner.contexts == {}
    assert fl.Chain(inner, fl.Identity()).contexts == {}


def test_a_tree_built_around_one_with_contexts_gets_them() -> None:
    inner = fl.Chain(reader())
    inner.set_context("side", {"text": "early"})
    root = fl.Parallel(fl.Chain(inner), fl.Chain(reader()))
    assert root(X) == ("early", "early")


def test_of_trees_put_into_one_together_the_last_has_the_last_word() -> None:
    trees = [fl.Chain(reader()) for _ in range(50)]
    for index, tree in enumerate(trees):
        tree.set_context("side", {"text": index})
    assert fl.Parallel(trees)(X) == (49,) * 50


def test_structural_copies_have_contexts_of_their_own() -> None:
    chain = nested(reader())
    chain.set_context("side", {"text": "original"})
    copy, other = chain.structural_copy(), chain.structural_copy()
    assert copy.contexts == {}
    copy.set_context("side", {"text": "copy"})
    other.set_context("side", {"text": "other"})
    assert (other(X), chain(X), copy(X)) == ("other", "original", "copy")


# --- contexts that calls start with -----------------------------------------------------------------------------------


def test_init_context_is_asked_anew_for_each_call() -> None:
    calls: list[int] = []

    def start() -> Contexts:
        calls.append(len(calls))
        return {"side": {"text": [calls[-1]]}}

    chain = fl.Chain(fl.Chain(Starts(start, fl.Parallel(reader(), reader()))))
    assert calls == []
    for call in range(3):
        first, second = chain(X)
        assert first is second
        assert first == [call]
    assert calls == [0, 1, 2]


@pytest.mark.parametrize("early", [False, True], ids=["set at the root", "set inside before the tree was built"])
def test_init_contexts_are_merged_and_outer_chains_have_the_last_word(early: bool) -> None:
    inner = Starts(
        lambda: {"side": {"a": "inner", "b": "inner", "c": "inner"}},
        fl.Parallel(reader("a"), reader("b"), reader("c"), reader("d")),
    )
    if early:
        inner.set_context("side", {"d": "set"})
    middle = Starts(lambda: {"side": {"b": "middle", "c": "middle"}}, fl.Chain(inner))
    root = Starts(lambda: {"side": {"c": "root"}}, fl.Chain(middle))
    if not early:
        root.set_context("side", {"d": "set"})
    assert root(X) == ("inner", "middle", "root", "set")


def test_what_is_set_overrides_what_calls_start_with() -> None:
    chain = Starts(lambda: {"side": {"text": "start", "b": "start"}}, fl.Parallel(reader("b"), reader()))
    chain.set_context("side", {"text": "set"})
    assert chain(X) == ("start", "set")
    assert chain(X) == ("start", "start")
    chain.set_context("side", {"text": "set"})
    assert chain.contexts == {"side": {"text": "set", "b": "start"}}


def test_init_context_may_use_what_its_constructor_sets_last() -> None:
    class Late(fl.Chain):
        def __init__(self, inner: fl.Chain) -> None:
            super().__init__(inner)
            self.text = "late"

        def init_context(self) -> Contexts:
            return {"side": {"text": self.text}}

    inner = fl.Chain(fl.Parallel(reader(), reader("b")))
    inner.set_context("side", {"b": "early"})
    assert Late(inner)(X) == ("late", "early")


def test_a_chain_that_comes_after_contexts_were_set_still_starts_its_own() -> None:
    root = fl.Chain(fl.Parallel(reader(), fl.Identity()), fl.GetArg(0))
    root.set_context("side", {"text": "set"})
    root.append(fl.Chain(Starts(lambda: {"side": {"text": "start", "b": "start"}}, fl.Parallel(reader(), reader("b")))))
    assert root(X) == ("set", "start")
    assert root(X) == ("start", "start")


# --- layers that read and write ---------------------------------------------------------------------------------------


def test_use_context_composes_functions_in_order() -> None:
    layer = reader().compose(lambda value: value + 1).compose(lambda value: value * 2)
    assert isinstance(layer, fl.UseContext)
    chain = fl.Chain(layer)
    chain.set_context("side", {"text": 3})
    assert chain(X) == 8


def test_composing_a_structural_copy_leaves_the_original_alone() -> None:
    chain = fl.Chain(reader())
    copy = chain.structural_copy()
    copy.UseContext.compose(lambda value: value + 1)
    chain.set_context("side", {"text": 3})
    copy.set_context("side", {"text": 3})
    assert (chain(X), copy(X)) == (3, 4)


@pytest.mark.parametrize("inputs", [(), (X,), (X, X)])
def test_use_context_reads_whatever_its_inputs_are(inputs: tuple[Tensor, ...]) -> None:
    chain = fl.Chain(reader())
    chain.set_context("side", {"text": "hello"})
    assert chain(*inputs) == "hello"


def test_set_context_stores_its_input_and_passes_it_on() -> None:
    chain = fl.Chain(nested(fl.SetContext("side", "text")), fl.Multiply(2), fl.Parallel(fl.Identity(), reader()))
    doubled, stored = chain(X)
    assert stored is X
    assert doubled.tolist() == [2]
    assert chain.contexts == {}


def test_set_context_default_makes_what_is_not_there_and_leaves_what_is() -> None:
    chain = fl.Chain(
        fl.SetContextDefault("side", "text", fl.Lambda(lambda x: x + 1), fl.Lambda(lambda x: 2 * x)), reader()
    )
    assert torch.equal(chain(X), 2 * (X + 1))
    chain.set_context("side", {"other": "else"})
    assert torch.equal(chain(X), 2 * (X + 1))
    chain.set_context("side", {"text": "given"})
    assert chain(X) == "given"
    copy = chain.structural_copy()
    assert torch.equal(copy(X), 2 * (X + 1)) and "key='text'" in repr(copy)


def test_set_context_default_passes_its_inputs_on() -> None:
    layer = fl.SetContextDefault("side", "text", fl.Lambda(lambda *inputs: len(inputs)))
    chain = fl.Chain(fl.Parallel(layer, reader()))
    assert chain(X) == (X, 1) and layer(X, X) == (X, X)


def test_set_context_keeps_the_other_keys() -> None:
    chain = fl.Chain(fl.SetContext("side", "text"), fl.Parallel(reader(), reader("b")))
    chain.set_context("side", {"b": 2})
    assert chain(1) == (1, 2)


def test_set_context_with_a_callback_gets_what_is_stored_and_the_input_and_stores_nothing() -> None:
    calls: list[Any] = []
    layer = fl.SetContext("side", "text", callback=lambda old, new: calls.append((old, new)))
    chain = fl.Chain(layer, fl.Lambda(lambda x: (x, dict(chain.contexts["side"]))))
    assert chain("input") == ("input", {})
    chain.set_context("side", {"text": "stored"})
    assert chain("input") == ("input", {"text": "stored"})
    assert calls == [(None, "input"), ("stored", "input")]


# --- errors -----------------------------------------------------------------------------------------------------------


def errors() -> dict[str, tuple[fl.ContextModule, Context, list[str]]]:
    return {
        "no context": (nested(reader()), {}, ["no context 'side' at Chain", "set: 'first', 'second'"]),
        "no key": (nested(reader()), {"a": 1, "b": 2}, ["no key 'text' in context 'side'", "set: 'a', 'b'"]),
    }


@pytest.mark.parametrize("case", errors())
def test_what_was_not_set_is_a_key_error_that_reads_as_a_sentence_and_names_what_is(case: str) -> None:
    chain, side, sentences = errors()[case]
    if side:
        chain.set_context("side", side)
    else:
        chain.set_context("first", {"a": 1})
        chain.set_context("second", {"a": 1})
    with pytest.raises(ContextError) as caught:
        chain(X)
    assert isinstance(caught.value, KeyError)
    assert all(sentence in str(caught.value) for sentence in sentences)
    assert not re.search(r"^['\"]|\\'", str(caught.value))


def test_without_any_context_the_error_says_none_and_how_to_set_it() -> None:
    for chain in (nested(reader()), reader()):
        with pytest.raises(ContextError, match=re.escape(f"at {type(chain).__name__} (set: none)")) as caught:
            chain(X)
        assert "set_context('side', {...})" in str(caught.value)


@pytest.mark.parametrize("value", [3, None, [("text", 1)], "text"])
def test_a_context_that_is_no_dict_is_a_type_error_and_sets_nothing(value: Any) -> None:
    chain = fl.Chain(reader())
    with pytest.raises(TypeError, match="context 'side' must be a dict"):
        chain.set_context("side", value)
    assert chain.contexts == {}


# --- compiled ---------------------------------------------------------------------------------------------------------


def model() -> fl.Chain:
    """Reads a context at depth, keeps shapes in another, and computes."""
    return fl.Chain(
        nested(fl.Residual(fl.Linear(3, 3), fl.SiLU(), fl.Sum(fl.Identity(), reader()))),
        fl.SetContext("kept", "x"),
        fl.Residual(fl.Parallel(fl.Identity(), reader("x", "kept")), fl.Lambda(torch.mul)),
        fl.Unsqueeze(-1),
        fl.Unsqueeze(-1),
        fl.SelfAttention2d(3),
    )


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "compile method"])
def test_a_chain_with_contexts_compiles_whole_and_only_once_for_changing_values(in_place: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    chain = model()
    plain = chain.structural_copy()
    compiled = chain
    if in_place:
        chain.compile(backend=counter, fullgraph=True)
    else:
        compiled = torch.compile(chain, backend=counter, fullgraph=True)
    x = torch.randn(2, 3)
    for step in range(10):
        value = {"text": torch.full((2, 3), float(step))}
        chain.set_context("side", value)
        plain.set_context("side", value)
        assert torch.equal(compiled(x), plain(x))
        assert chain._contexts is None
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_chain_that_only_starts_contexts_of_its_own_compiles_only_once() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    chain = fl.SelfAttention2d(3)
    plain = chain.structural_copy()
    compiled = torch.compile(chain, backend=counter, fullgraph=True)
    for _ in range(10):
        x = torch.randn(1, 3, 2, 4)
        assert torch.equal(compiled(x), plain(x))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's, when it gives up on a broken graph
@pytest.mark.parametrize(("fullgraph", "error"), [(False, ContextError), (True, RuntimeError)])
def test_a_compiled_chain_tells_which_context_was_not_set(fullgraph: bool, error: type[Exception]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fl.Chain(fl.Linear(3, 3), reader()), backend="eager", fullgraph=fullgraph)
    with pytest.raises(error, match="no context 'side' at Chain"):
        compiled(torch.ones(1, 3))
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_chain_with_contexts_compiles_with_the_eager_backend_and_keeps_gradients() -> None:
    torch._dynamo.reset()
    chain = model()
    plain = chain.structural_copy()
    compiled = torch.compile(chain, backend="eager", fullgraph=True)
    x = torch.randn(2, 3)
    gradients: list[tuple[Tensor, ...]] = []
    for call, tree in ((compiled, chain), (plain, plain)):
        text = torch.ones(2, 3, requires_grad=True)
        tree.set_context("side", {"text": text})
        gradients.append(torch.autograd.grad(call(x).sum(), [text, *chain.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0][0].abs().min() > 0
    torch._dynamo.reset()
