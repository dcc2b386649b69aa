"""Adapted trees compile as one graph, and nothing that changes between calls compiles them anew."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from adapter_specimens import WIDTH, Deep, Doubled, Gain, Side, lora_on, randomize
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import refiners.fluxion.layers as fl
from refiners.adapters import Conv2dLora, LinearLora, LoraAdapter

pytestmark = pytest.mark.slow
RANKS = (2, 3, 1)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Compiled:
    """A tree compiled whole, that knows how often; every call is checked against the tree as it is."""

    def __init__(self, tree: fl.Chain, set_contexts: Callable[[], None] = lambda: None) -> None:
        self.tree, self.set_contexts = tree, set_contexts
        self.counter = CompileCounter()
        self.call = torch.compile(tree, fullgraph=True, backend=self.counter)

    def check(self, *inputs: Tensor) -> Tensor:
        """Call both ways and compare; raises if this compiles anything after the first call."""
        self.set_contexts()
        expected = self.tree(*inputs)
        self.set_contexts()
        with torch._dynamo.config.patch(error_on_recompile=True):
            output = self.call(*inputs)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        assert self.counter.frame_count == 1
        return output


def block(width: int = 8) -> fl.Chain:
    """A transformer's block that attends to a context and adds another."""
    return fl.Chain(
        fl.Residual(
            fl.LayerNorm(width),
            fl.Parallel(fl.Identity(), fl.UseContext("text", "embedding"), fl.UseContext("text", "embedding")),
            fl.Attention(width, num_heads=2),
        ),
        fl.Sum(fl.Linear(width, width), fl.Chain(fl.UseContext("time", "embedding"), fl.Linear(width, width))),
        fl.Residual(fl.LayerNorm(width), fl.Linear(width, 2 * width), fl.GeLU(), fl.Linear(2 * width, width)),
        fl.SetContext("seen", "last"),
    )


def model_and_contexts() -> tuple[fl.Chain, Callable[[], None], list[int]]:
    """Two blocks, what sets the contexts before a call, and the step (in a list) that the values depend on."""
    model, step = fl.Chain(block()), [0]
    randomize(model)

    def set_contexts() -> None:
        generator = torch.Generator().manual_seed(step[0])
        model.root.set_context("text", {"embedding": torch.randn(2, 5, 8, generator=generator)})
        model.root.set_context("time", {"embedding": torch.randn(2, 1, 8, generator=generator)})

    return model, set_contexts, step


def plain(model: fl.Chain) -> None:
    """No adapters at all."""


def leaves_and_chains(model: fl.Chain) -> None:
    Doubled(model.Chain.Sum).inject()
    Deep(model.Chain.Sum.base.Linear).inject()
    for kind in (Gain, Doubled, Deep):
        kind(model.Chain).inject()
    Gain(model.Chain).inject()


def one_lora_each(model: fl.Chain) -> None:
    for linear, parent in model.walk(fl.Linear):
        lora_on(linear).inject(parent)


def stacked_loras(model: fl.Chain) -> None:
    for linear in list(model.ensure_find(fl.Attention).layers(fl.Linear)):
        for rank in RANKS:
            lora_on(linear, rank=rank).inject()


def several_in_one(model: fl.Chain) -> None:
    for linear in list(model.Chain.Residual_2.layers(fl.Linear)):
        adapter = lora_on(linear, name="n0").inject()
        for index, rank in enumerate(RANKS):
            lora = LinearLora(f"n{index + 1}", linear.in_features, linear.out_features, rank=rank)
            nn.init.normal_(lora.up.weight)
            adapter.add_lora(lora)


each_way_to_adapt = pytest.mark.parametrize(
    "adapt", [plain, leaves_and_chains, one_lora_each, stacked_loras, several_in_one]
)


@each_way_to_adapt
def test_one_graph_serves_ten_values_of_the_contexts(adapt: Callable[[fl.Chain], None]) -> None:
    model, set_contexts, step = model_and_contexts()
    adapt(model)
    compiled = Compiled(model, set_contexts)
    outputs: list[Tensor] = []
    for step[0] in range(10):
        outputs.append(compiled.check(torch.ones(2, 3, 8)))
    assert all(not torch.allclose(one, other) for one, other in pairwise(outputs))


@pytest.mark.parametrize("adapt", [leaves_and_chains, stacked_loras])
def test_gradients_of_the_compiled_tree_are_those_of_the_tree(adapt: Callable[[fl.Chain], None]) -> None:
    model, set_contexts, _ = model_and_contexts()
    adapt(model)
    x = torch.randn(2, 3, 8)

    def gradients(call: Any) -> list[Tensor]:
        set_contexts()
        return list(torch.autograd.grad(call(x).square().sum(), list(model.parameters())))

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled), gradients(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


# -- what changes between calls

MAKERS: dict[str, tuple[Callable[[], Any], Callable[[str, int], Any], tuple[int, ...]]] = {
    "linear": (lambda: fl.Linear(8, 8), lambda name, rank: LinearLora(name, 8, 8, rank=rank), (5, 8)),
    "conv": (
        lambda: fl.Conv2d(4, 4, 3, padding=1),
        lambda name, rank: Conv2dLora(name, 4, 4, rank=rank, kernel_size=(3, 1), padding=(1, 0)),
        (2, 4, 6, 6),
    ),
}


def new_lora(kind: str, name: str, rank: int) -> Any:
    lora = MAKERS[kind][1](name, rank)
    nn.init.normal_(lora.up.weight)
    return lora


def adapted(kind: str, count: int, nested: bool = False) -> tuple[Compiled, list[LoraAdapter], Tensor]:
    chain = fl.Chain(fl.SiLU(), fl.Residual(MAKERS[kind][0](), fl.SiLU()))
    loras = [new_lora(kind, f"n{index}", RANKS[index]) for index in range(count)]
    for group in [[lora] for lora in loras] if nested else [loras]:
        LoraAdapter(chain.Residual[0], *group).inject()
    return Compiled(chain), list(chain.layers(LoraAdapter, recurse=True)), torch.randn(MAKERS[kind][2])


def other_scales(adapters: list[LoraAdapter], step: int) -> None:
    for adapter in adapters:
        adapter.scale = 0.3 * step - 1


def other_weights(adapters: list[LoraAdapter], step: int) -> None:
    for adapter in adapters:
        for lora in adapter.loras.values():
            down, up = torch.randn_like(lora.down.weight), torch.randn_like(lora.up.weight)
            lora.load_weights(down, up, alpha=step + 1.0)


def another_checkpoint(adapters: list[LoraAdapter], step: int) -> None:
    root = adapters[0].root
    state = {name: torch.randn_like(value) for name, value in root.state_dict().items()}
    root.load_state_dict(state)


def one_step_of_training(adapters: list[LoraAdapter], step: int) -> None:
    parameters = [p for adapter in adapters for lora in adapter.loras.values() for p in lora.parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(parameters, lr=0.1).step()


def other_loras_of_the_same_rank(adapters: list[LoraAdapter], step: int) -> None:
    for adapter in adapters:
        kind = "linear" if isinstance(adapter.base, nn.Linear) else "conv"
        for name, lora in adapter.loras.items():
            adapter.remove_lora(name)
            adapter.add_lora(new_lora(kind, f"{name}'", lora.rank))


CHANGES = [other_scales, other_weights, another_checkpoint, one_step_of_training, other_loras_of_the_same_rank]


@pytest.mark.parametrize(
    ("kind", "count", "nested"), [("linear", 1, False), ("linear", 3, True), ("conv", 3, False), ("conv", 2, True)]
)
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_about_a_lora_but_its_rank_compiles_anew(
    kind: str, count: int, nested: bool, change: Callable[[list[LoraAdapter], int], None]
) -> None:
    compiled, adapters, x = adapted(kind, count, nested)
    before = compiled.check(x)
    for step in range(3):
        change(adapters, step)
        after = compiled.check(x)
        assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
        before = after


def test_a_new_rank_does_compile_anew() -> None:
    compiled, (adapter,), x = adapted("linear", 1)
    compiled.check(x)
    adapter.add_lora(new_lora("linear", "more", 5))
    with pytest.raises(torch._dynamo.exc.RecompileError):
        compiled.check(x)


def test_a_lora_that_is_added_or_ejected_is_not_missed_by_what_was_compiled() -> None:
    chain = fl.Chain(fl.Linear(8, 8), fl.ReLU())
    compiled, x = torch.compile(chain, fullgraph=True, backend="eager"), torch.randn(5, 8)
    plain_output = compiled(x)
    adapter = lora_on(chain.Linear, rank=2).inject()
    one = compiled(x)
    adapter.add_lora(new_lora("linear", "more", 5))
    two = compiled(x)
    torch.testing.assert_close(two, chain(x))
    assert not torch.allclose(one, two) and not torch.allclose(one, plain_output)
    adapter.remove_lora("more")
    torch.testing.assert_close(compiled(x), one)
    adapter.eject()
    torch.testing.assert_close(compiled(x), plain_output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float32_loras_on_any_base_compile_whole(dtype: torch.dtype) -> None:
    chain = fl.Chain(fl.Linear(8, 8, dtype=dtype))
    adapter = lora_on(chain.Linear, dtype=torch.float32).inject()
    adapter.add_lora(new_lora("linear", "more", 3))
    call = torch.compile(chain, fullgraph=True, backend="eager")
    x = torch.randn(5, 8, dtype=dtype)
    torch.testing.assert_close(call(x), chain(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(call(x), chain(x))


def test_compiling_a_tree_in_place_survives_adapters() -> None:
    chain, x = fl.Chain(fl.Linear(WIDTH, WIDTH), fl.ReLU()), torch.randn(5, WIDTH)
    chain.compile(fullgraph=True, backend="eager")
    before = chain(x)
    adapter = Side(chain.Linear).inject()
    torch.testing.assert_close(chain(x), fl.ReLU()(adapter.target(x) + adapter[-1](x)))
    adapter.eject()
    assert torch.equal(chain(x), before)


# -- inductor and export


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it looks for what it can fuse
def test_inductor_computes_what_the_tree_computes() -> None:
    model, set_contexts, step = model_and_contexts()
    several_in_one(model)
    compiled = torch.compile(model, fullgraph=True)
    for step[0] in range(2):
        set_contexts()
        expected = model(torch.ones(2, 3, 8))
        set_contexts()
        torch.testing.assert_close(compiled(torch.ones(2, 3, 8)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # it sets contexts, and drops them
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("adapt", [leaves_and_chains, stacked_loras, several_in_one])
def test_an_exported_tree_computes_the_same_under_the_same_names(
    adapt: Callable[[fl.Chain], None], strict: bool
) -> None:
    class Whole(nn.Module):
        """Contexts are no inputs of a graph: an exporter passes them on as such."""

        def __init__(self, tree: fl.Chain) -> None:
            super().__init__()
            self.tree = tree

        def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
            self.tree.set_context("text", {"embedding": text})
            self.tree.set_context("time", {"embedding": time})
            return self.tree(x)

    model, _, _ = model_and_contexts()
    adapt(model)
    whole = Whole(model).eval()
    inputs = (torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 1, 8))
    program = torch.export.export(whole, inputs, strict=strict)
    others = tuple(torch.randn_like(value) for value in inputs)
    torch.testing.assert_close(program.module()(*others), whole(*others), rtol=1e-4, atol=1e-5)
    used = {name for name in program.state_dict if not name.endswith("alpha")}
    assert used == {name for name in whole.state_dict() if not name.endswith("alpha")}
    assert all(program.state_dict[name].data_ptr() == whole.state_dict()[name].data_ptr() for name in used)
    named = dict(whole.named_parameters())
    assert set(program.graph_signature.parameters) == named.keys()
