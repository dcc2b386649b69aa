"""How chains pass values on: what is spread, added, joined or left out, and what happens to what does not fit."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Size, Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import refiners.fluxion.layers as fl


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class TwoOutputs(fl.WeightedModule):
    """A user's layer, of a base that often returns one value."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.weight, x


class TwoOutputsLinear(fl.Linear):
    """A user's layer, of a class that always returns one value."""

    def forward(self, input: Tensor) -> Any:
        return input + 1, input


def subtract(a: Tensor, b: Tensor) -> Tensor:
    return a - b


def fail(*_: Any) -> None:
    raise AssertionError("this layer should not be called")


def x(*values: float) -> Tensor:
    return torch.tensor(values or (1.0, 2.0, 3.0))


# --- chains -----------------------------------------------------------------------------------------------------------

SPREAD: dict[str, nn.Module] = {
    "tuple": fl.Lambda(lambda x: (x + 1, x)),
    "named tuple": fl.Lambda(lambda x: Pair(x + 1, x)),
    "torch's return type": fl.Lambda(lambda x: torch.return_types.sort((x + 1, x))),
    "parallel": fl.Parallel(fl.Multiply(bias=1), fl.Identity()),
    "a user's weighted module": TwoOutputs(),
    "a user's linear": TwoOutputsLinear(3, 3),
    "a chain": fl.Chain(fl.Identity(), TwoOutputs()),
}


@pytest.mark.parametrize("source", SPREAD)
def test_what_is_a_tuple_is_spread_over_the_inputs_of_the_next_layer(source: str) -> None:
    layer = SPREAD[source]
    chain = fl.Chain(layer, fl.Lambda(subtract))
    assert chain(x()).tolist() == [1, 1, 1]
    chain.remove(layer)
    late = fl.Chain(fl.Multiply(2), fl.Lambda(subtract))
    late.insert(1, layer)
    assert late(x()).tolist() == [1, 1, 1]
    late.append(fl.Multiply(3))
    assert late(x()).tolist() == [3, 3, 3]
    late.remove(layer)


def test_a_tuple_of_one_is_spread_and_of_none_calls_without_inputs() -> None:
    assert fl.Chain(fl.Lambda(lambda x: (x,)), fl.Multiply(2))(x()).tolist() == [2, 4, 6]
    assert fl.Chain(fl.Lambda(lambda _: ()), fl.Lambda(lambda: "called"))(x()) == "called"


def test_a_list_and_a_tensor_are_not_spread() -> None:
    count = fl.Lambda(lambda *inputs: len(inputs))
    assert fl.Chain(fl.Lambda(lambda x: [x, x]), count)(x()) == 1
    assert fl.Chain(fl.Lambda(lambda x: x), count)(x()) == 1


def test_the_last_output_is_returned_as_it_is() -> None:
    output = fl.Chain(fl.Identity(), fl.Lambda(lambda x: Pair(x, x)))(x())
    assert isinstance(output, Pair)
    assert fl.Chain(fl.Lambda(lambda *inputs: inputs))(1) == (1,)


def test_a_chain_gives_its_inputs_to_its_first_layer() -> None:
    assert fl.Chain(fl.Lambda(subtract), fl.Multiply(2))(x(5.0), x(3.0)).tolist() == [4]
    assert fl.Chain(fl.Lambda(lambda: 7))() == 7


@pytest.mark.parametrize(
    "first", [fl.Identity(), nn.Identity(), fl.Lambda(lambda x: x)], ids=["ours", "torch's", "other"]
)
def test_a_tuple_given_as_one_input_is_spread_when_it_is_passed_on(first: nn.Module) -> None:
    chain = fl.Chain(first, fl.Lambda(subtract))
    assert chain((5, 3)) == 2
    assert fl.Distribute(chain, fl.GetArg(0))((5, 3), 7) == (2, 7)


@pytest.mark.parametrize("cls", [fl.Chain, fl.Passthrough])
def test_without_layers_the_inputs_are_returned(cls: Callable[[], fl.Chain]) -> None:
    a, b = x(), x()
    assert cls()(a) is a
    assert cls()(a, b) == (a, b)
    assert fl.Chain(cls(), fl.Lambda(subtract))(a, b).tolist() == [0, 0, 0]
    assert cls()() == ()


@settings(deadline=None)
@given(st.lists(st.sampled_from(["multiply", "residual", "sum", "both", "nested", "lambda", "parallel"]), max_size=8))
def test_a_chain_is_its_layers_called_one_after_the_other(names: list[str]) -> None:
    builders: dict[str, Callable[[], nn.Module]] = {
        "multiply": lambda: fl.Multiply(0.5, 1),
        "residual": lambda: fl.Residual(fl.Sin(), fl.Multiply(2)),
        "sum": lambda: fl.Sum(fl.Sin(), fl.Cos()),
        "both": lambda: fl.Chain(fl.Parallel(fl.Sin(), fl.Identity()), fl.Lambda(subtract)),
        "nested": lambda: fl.Chain(fl.Chain(fl.Cos(), fl.Multiply(3))),
        "lambda": lambda: fl.Lambda(lambda x: (x * 2,)),
        "parallel": lambda: fl.Chain(fl.Parallel(fl.Cos(), fl.Sin()), fl.GetArg(1)),
    }
    layers = [builders[name]() for name in names]
    expected: Any = x()
    for layer in layers:
        expected = layer(*expected) if isinstance(expected, tuple) else layer(expected)
    output = fl.Chain(layers)(x())
    assert_close(output, expected, rtol=0, atol=0)


# --- sums and the like ------------------------------------------------------------------------------------------------


def test_sum_adds_what_all_children_make_of_the_same_inputs() -> None:
    layer = fl.Sum(fl.Lambda(subtract), fl.GetArg(1), fl.Parallel(fl.GetArg(0), fl.GetArg(0), fl.GetArg(1)))
    assert layer(x(5.0), x(3.0)).tolist() == [5 - 3 + 3 + 5 + 5 + 3]
    assert fl.Sum(fl.Multiply(2))(x()).tolist() == [2, 4, 6]
    with pytest.raises(ValueError, match="no children"):
        fl.Sum()(x())


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([fl.Multiply(2), fl.Multiply(bias=1)], [4, 7, 10]),
        ([fl.Parallel(fl.Multiply(3), fl.Identity()), fl.Lambda(subtract)], [3, 6, 9]),
        ([], [2, 4, 6]),
    ],
    ids=["straight", "with a tuple inside", "empty"],
)
def test_residual_adds_its_input_to_its_output(layers: list[nn.Module], expected: list[float]) -> None:
    inputs = x()
    assert fl.Residual(layers)(inputs).tolist() == expected
    assert inputs.tolist() == [1, 2, 3]


def test_residual_refuses_several_inputs() -> None:
    with pytest.raises(ValueError, match=r"one input.* got 2 inputs"):
        fl.Residual(fl.Identity())(x(), x())


def test_parallel_gives_every_child_the_same_inputs() -> None:
    assert fl.Parallel(fl.Lambda(subtract), fl.GetArg(1), fl.Lambda(lambda a, b: (a, b)))(5, 3) == (2, 3, (5, 3))
    assert fl.Parallel()(x()) == ()


def test_cascade_returns_what_each_layer_of_a_chain_gives() -> None:
    layer = fl.Cascade(fl.Lambda(lambda a, b: (a, b)), fl.Lambda(subtract), fl.Multiply(2))
    pair, difference, doubled = layer(x(5.0), x(3.0))
    assert [value.tolist() for value in (*pair, difference, doubled)] == [[5], [3], [2], [4]]
    assert fl.Cascade()(x()) == ()


def test_distribute_gives_each_child_its_own_input() -> None:
    a, b = fl.Distribute(fl.Multiply(2), fl.Multiply(bias=1))(x(), x())
    assert (a.tolist(), b.tolist()) == ([2, 4, 6], [2, 3, 4])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_distribute_refuses_another_number_of_inputs_and_names_both(count: int) -> None:
    with pytest.raises(ValueError, match=f"2 children.* got {count} inputs"):
        fl.Distribute(fl.Lambda(fail), fl.Lambda(fail))(*[x()] * count)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_concatenate_joins_outputs_along_its_dimension_without_those_that_are_none(dim: int) -> None:
    inputs = torch.arange(6.0).reshape(2, 3)
    layer = fl.Concatenate(fl.Identity(), fl.Lambda(lambda _: None), fl.Multiply(2), dim=dim)
    assert torch.equal(layer(inputs), torch.cat([inputs, inputs * 2], dim=dim))
    assert f"dim={dim}" in repr(layer)


def test_concatenate_joins_along_the_first_dimension_by_default_and_takes_several_inputs() -> None:
    a, b = torch.tensor([[5.0, 6.0]]), torch.tensor([[3.0, 3.0]])
    assert fl.Concatenate(fl.GetArg(1), fl.Lambda(subtract))(a, b).tolist() == [[3, 3], [2, 3]]


def test_matmul_multiplies_what_two_children_make_of_the_same_inputs() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    assert torch.equal(fl.Matmul(input=fl.GetArg(0), other=fl.GetArg(1))(a, b), a @ b)
    with pytest.raises(TypeError):
        fl.Matmul(fl.Identity(), fl.Identity(), fl.Identity())  # type: ignore


def test_passthrough_runs_its_children_and_returns_its_inputs() -> None:
    seen: list[Any] = []
    layer = fl.Passthrough(fl.Lambda(subtract), fl.Lambda(seen.append))
    assert layer(5, 3) == (5, 3)
    assert seen == [2]
    assert fl.Passthrough(fl.Multiply(2))(x()).tolist() == [1, 2, 3]


# --- picking and ending -----------------------------------------------------------------------------------------------


def test_return_ends_its_own_chain_only() -> None:
    inner = fl.Chain(fl.Multiply(2), fl.Return(), fl.Lambda(fail))
    assert fl.Chain(inner, fl.Multiply(bias=1))(x()).tolist() == [3, 5, 7]
    assert fl.Chain(fl.Return(), fl.Lambda(fail))(1, 2) == (1, 2)


@pytest.mark.parametrize(
    ("cls", "expected"), [(fl.Residual, [3, 6, 9]), (fl.Sum, [2, 4, 6]), (fl.Parallel, [[2, 4, 6]])]
)
def test_return_ends_other_combinators_too(cls: type[fl.Chain], expected: list[Any]) -> None:
    output = cls(fl.Multiply(2), fl.Return(), fl.Lambda(fail))(x())
    assert ([value.tolist() for value in output] if isinstance(output, tuple) else output.tolist()) == expected


def test_what_stands_behind_return_still_belongs_to_the_tree() -> None:
    chain = fl.Chain(fl.Identity(), fl.Return(), fl.Linear(3, 3))
    assert list(chain.state_dict()) == ["Linear.weight", "Linear.bias"]
    chain.pop(1)
    assert torch.equal(chain(x()), chain.Linear(x()))


@pytest.mark.parametrize(("index", "expected"), [(0, "a"), (2, "c"), (-1, "c"), (-3, "a")])
def test_get_arg_picks_an_input_by_index(index: int, expected: str) -> None:
    assert fl.GetArg(index)("a", "b", "c") == expected


@pytest.mark.parametrize("index", [3, -4])
def test_get_arg_beyond_its_inputs_is_an_error_that_names_both_numbers(index: int) -> None:
    with pytest.raises(IndexError, match=rf"GetArg\({index}\) got only 3 inputs"):
        fl.GetArg(index)("a", "b", "c")


def test_lambda_calls_its_function_with_all_inputs() -> None:
    assert fl.Lambda(subtract)(5, 3) == 2
    assert fl.Lambda(max)(3, 5, 4) == 5
    assert fl.Lambda(lambda: 7)() == 7


def test_breakpoint_stops_once_per_call_and_passes_its_inputs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stops: list[str] = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: stops.append("stopped"))
    inputs = x()
    assert fl.Breakpoint()(inputs) is inputs
    assert fl.Chain(fl.Breakpoint(), fl.Lambda(subtract))(5, 3) == 2
    assert stops == ["stopped", "stopped"]


# --- converting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_device", [True, False])
@pytest.mark.parametrize("set_dtype", [True, False])
def test_converter_moves_inputs_to_the_place_of_its_chain(set_device: bool, set_dtype: bool) -> None:
    place = fl.Parameter(1, device="meta", dtype=torch.float64)
    chain = fl.Chain(fl.Converter(set_device, set_dtype), fl.Return(), place)
    outputs = chain(x(), torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.bool))
    assert {output.device.type for output in outputs} == {"meta" if set_device else "cpu"}
    float_dtype = torch.float64 if set_dtype else torch.float32
    assert [output.dtype for output in outputs] == [float_dtype, torch.int32, torch.bool]


def test_converter_returns_one_input_bare_and_changes_nothing_without_weights() -> None:
    inputs = x()
    assert fl.Chain(fl.Converter())(inputs) is inputs
    assert fl.Chain(fl.Converter(), fl.Linear(3, 1, dtype=torch.float64))(inputs).dtype == torch.float64


@pytest.mark.parametrize("layer", [fl.Converter(), fl.SetContext("side", "key")])
def test_a_layer_that_needs_a_chain_says_so_when_it_has_none(layer: fl.ContextModule) -> None:
    with pytest.raises(AttributeError, match="sits in no Chain: put it into one first"):
        layer(x())


# --- smaller and larger -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (13, 6)])
@pytest.mark.parametrize("scale_factor", [2, 3])
@pytest.mark.parametrize("padding", [0, 1])
def test_upsample_undoes_downsample_for_any_size(size: tuple[int, int], scale_factor: int, padding: int) -> None:
    def down() -> fl.Downsample:
        return fl.Downsample(2, scale_factor=scale_factor, padding=padding)

    shapes: list[Size] = []
    watch = fl.Lambda(lambda x: shapes.append(x.shape[2:]) or x)
    chain = fl.Chain(
        down(), down(), fl.Chain(fl.Residual(fl.Upsample(2), watch, down())), fl.Upsample(2), fl.Upsample(2)
    )
    inner = down()(torch.ones(1, 2, *size))
    assert chain(torch.ones(1, 2, *size)).shape == (1, 2, *size)
    assert shapes == [inner.shape[2:]]


@pytest.mark.parametrize("register_shape", [True, False])
def test_downsample_is_a_strided_convolution_that_pads_right_and_bottom(register_shape: bool) -> None:
    layer, inputs = fl.Downsample(channels=2, scale_factor=2, register_shape=register_shape), torch.randn(1, 2, 7, 6)
    weight, bias = layer.Conv2d.weight, layer.Conv2d.bias
    assert_close(layer(inputs), F.conv2d(F.pad(inputs, (0, 1, 0, 1)), weight, bias, stride=2))
    padded = fl.Downsample(2, scale_factor=3, padding=1)
    expected = F.conv2d(inputs, padded.Conv2d.weight, padded.Conv2d.bias, stride=3, padding=1)
    assert_close(padded(inputs), expected)


def test_upsample_by_a_factor_is_nearest_neighbour_then_a_convolution() -> None:
    layer, inputs = fl.Upsample(channels=2, upsample_factor=3), torch.randn(1, 2, 3, 2)
    enlarged = inputs.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    assert_close(layer(inputs), F.conv2d(enlarged, layer.Conv2d.weight, layer.Conv2d.bias, padding=1))


def test_downsample_registers_no_shape_if_told_so_and_upsample_says_what_it_misses() -> None:
    chain = fl.Chain(fl.Downsample(2, 2), fl.Downsample(2, 2, register_shape=False), fl.Upsample(2), fl.Upsample(2))
    with pytest.raises(IndexError, match="each Upsample needs a Downsample before it"):
        chain(torch.ones(1, 2, 8, 8))
    chain.pop()
    assert chain(torch.ones(1, 2, 8, 8)).shape == (1, 2, 8, 8)
    with pytest.raises(KeyError, match="sampling"):
        fl.Upsample(2)(torch.ones(1, 2, 8, 8))
