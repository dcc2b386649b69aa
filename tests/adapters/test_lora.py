"""LoRAs: how they start, what scale and alpha mean, how they come, go, load, move and train."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapter_specimens import Doubled, Side, lora_on, make_input, make_model, picture
from torch import Tensor, nn, ones
from torch.nn.utils import parametrizations, parametrize

import refiners.fluxion.layers as fl
from refiners.adapters import Conv2dLora, LinearLora, LoraAdapter


def linear_lora(name: str = "a", rank: int = 2, **options: Any) -> LinearLora:
    lora = LinearLora(name, 4, 3, rank=rank, **options)
    nn.init.normal_(lora.up.weight)
    return lora


def conv_lora(name: str = "a", rank: int = 2, **options: Any) -> Conv2dLora:
    lora = Conv2dLora(name, 4, 3, rank=rank, **options)
    nn.init.normal_(lora.up.weight)
    return lora


def on_linear(count: int = 1, **options: Any) -> tuple[fl.Chain, LoraAdapter]:
    """A chain of one Linear with that many LoRAs of different ranks on it."""
    chain = fl.Chain(fl.Linear(4, 3))
    loras = [linear_lora(f"n{index}", rank=index + 1, **options) for index in range(count)]
    return chain, LoraAdapter(chain.Linear, *loras).inject()


def on_conv(count: int = 1, **options: Any) -> tuple[fl.Chain, LoraAdapter]:
    chain = fl.Chain(fl.Conv2d(4, 3, kernel_size=3, padding=1))
    adapter = LoraAdapter(chain.Conv2d, *(conv_lora(f"n{index}", index + 1, **options) for index in range(count)))
    return chain, adapter.inject()


each_base = pytest.mark.parametrize(("build", "shape"), [(on_linear, (5, 4)), (on_conv, (2, 4, 6, 6))])


def by_hand(adapter: LoraAdapter, x: Tensor) -> Tensor:
    """What the adapter says it computes, from nothing but weights and numbers as they are now."""
    output = adapter.base(x)
    for lora in adapter.loras.values():
        output = output + lora.up(lora.down(x)) * (lora.scale * lora.alpha.item() / lora.rank)
    return output


# -- how they start


@pytest.mark.parametrize("layer", [fl.Linear(4, 3), nn.Linear(4, 3), fl.Conv2d(4, 3, 3), nn.Conv2d(4, 3, 3)])
def test_a_new_lora_is_zero_and_can_learn(layer: Any) -> None:
    chain, x = fl.Chain(layer), torch.randn(5, 4, 6, 6) if hasattr(layer, "kernel_size") else torch.randn(5, 4)
    before = layer(x)
    adapter = LoraAdapter(layer, rank=2).inject()
    assert torch.equal(chain(x), before)
    (lora,) = adapter.loras.values()
    assert lora.down.weight.std() > 0.1 and not lora.up.weight.any()
    chain(x).sum().backward()
    assert lora.up.weight.grad.abs().sum() > 0
    adapter.eject()
    assert torch.equal(chain(x), before)


def test_defaults_are_those_of_the_documentation() -> None:
    adapter = LoraAdapter(fl.Linear(4, 3))
    (lora,) = adapter.loras.values()
    assert (adapter.names, adapter.scale, lora.rank, lora.scale) == (["lora"], 1.0, 16, 1.0)
    assert lora.alpha == 16 and lora.factor.tolist() == [1.0] * 16


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_new_lora_lies_where_its_target_lies(dtype: torch.dtype) -> None:
    for layer in (fl.Linear(4, 3, dtype=dtype, device="meta"), fl.Conv2d(4, 3, 1, dtype=dtype, device="meta")):
        (lora,) = LoraAdapter(layer).loras.values()
        assert (lora.dtype, lora.device.type, lora.factor.device.type) == (dtype, "meta", "meta")
        (lora,) = LoraAdapter(layer, dtype=torch.float32, device="cpu").loras.values()
        assert (lora.dtype, lora.device.type) == (torch.float32, "cpu")


# -- scale and alpha


@each_base
@pytest.mark.parametrize("alpha", [None, 0.5, 8.0])
def test_the_strength_is_scale_times_alpha_over_rank(build: Any, shape: tuple[int, ...], alpha: float | None) -> None:
    chain, adapter = build(2, alpha=alpha)
    x = torch.randn(shape)
    base, one = adapter.base(x), chain(x)
    for scale in (0.0, 1.0, -2.5, 0.125):
        adapter.scale = scale
        assert adapter.scales == {"n0": scale, "n1": scale}
        torch.testing.assert_close(chain(x), base + scale * (one - base), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(chain(x), by_hand(adapter, x), rtol=1e-5, atol=1e-5)
    adapter.loras["n1"].scale = 2
    assert adapter.scales == {"n0": 0.125, "n1": 2.0}
    torch.testing.assert_close(chain(x), by_hand(adapter, x), rtol=1e-5, atol=1e-5)
    for lora in adapter.loras.values():
        assert lora.alpha == (lora.rank if alpha is None else alpha)


def test_the_scale_of_several_loras_is_asked_for_one_by_one() -> None:
    _, adapter = on_linear(2)
    with pytest.raises(AttributeError, match=r"2 updates .*n0, n1"):
        _ = adapter.scale
    adapter.remove_lora("n0")
    assert adapter.scale == 1.0


# -- names, add and remove


def test_loras_are_added_and_removed_by_name() -> None:
    chain, adapter = on_linear(1)
    x = torch.randn(5, 4)
    before, output = picture(chain), chain(x)
    lora = linear_lora("extra", rank=3)
    adapter.add_lora(lora)
    assert adapter.names == ["n0", "extra"]
    assert adapter.loras["extra"] is lora
    torch.testing.assert_close(chain(x), output + lora(x))
    assert adapter.remove_lora("extra") is lora
    assert picture(chain) == before
    assert torch.equal(chain(x), output)
    adapter.remove_lora("n0")
    assert adapter.names == [] and torch.equal(chain(x), adapter.base(x))
    adapter.add_lora(lora)
    torch.testing.assert_close(chain(x), adapter.base(x) + lora(x))


def test_the_state_dict_has_down_up_and_alpha_and_the_names_of_the_base() -> None:
    model = make_model()
    keys = list(model.state_dict())
    adapter = lora_on(model.Linear, alpha=3.0).inject()
    own = [key for key in model.state_dict() if key not in keys]
    assert own == [f"Linear.LoraAdapter.LinearLora.{name}" for name in ("alpha", "down.weight", "up.weight")]
    assert model.state_dict()[own[0]] == 3.0
    assert [key for key in model.state_dict() if key in keys] == keys
    adapter.add_lora(LinearLora("second", 4, 4))
    assert own == [key for key in model.state_dict() if key not in keys][:3]


# -- mistakes


def grouped(rank: int) -> LoraAdapter:
    return LoraAdapter(fl.Conv2d(4, 6, 3, groups=2), rank=rank)


FAULTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no target": (lambda: LoraAdapter(fl.LayerNorm(4)), TypeError, "a Linear or a Conv2d, not a LayerNorm"),
    "chain": (lambda: LoraAdapter(fl.Chain(fl.Linear(4, 4))), TypeError, "a Linear or a Conv2d, not a Chain"),
    "adapted chain": (lambda: LoraAdapter(Doubled(fl.Chain())), TypeError, "a Linear or a Conv2d, not a Chain"),
    "misfit": (lambda: LoraAdapter(fl.Linear(5, 3), linear_lora()), ValueError, "'a'.* maps 4 to 3 .*layer 5 to 3"),
    "conv": (lambda: LoraAdapter(fl.Conv2d(4, 5, 1), conv_lora()), ValueError, "'a'.* maps 4 to 3 .*layer 4 to 5"),
    "stride": (lambda: LoraAdapter(fl.Conv2d(4, 3, 1, 2), conv_lora()), ValueError, r"stride is \(1, 1\).*\(2, 2\)"),
    "wrong kind": (lambda: LoraAdapter(fl.Linear(4, 3), conv_lora()), ValueError, "a convolution, not a Linear"),
    "conv target": (lambda: LoraAdapter(fl.Conv2d(4, 3, 1), linear_lora()), ValueError, "linear layer, not a Conv2d"),
    "same names": (lambda: LoraAdapter(fl.Linear(4, 3), linear_lora(), linear_lora()), ValueError, "LoRA 'a' on this"),
    "added misfit": (lambda: on_linear()[1].add_lora(LinearLora("b", 4, 4)), ValueError, "maps 4 to 4 .*layer 4 to 3"),
    "name taken": (lambda: on_linear()[1].add_lora(linear_lora("n0")), ValueError, "'n0' on this layer already"),
    "not there": (lambda: on_linear(2)[1].remove_lora("b"), KeyError, "no update 'b' here; there are: n0, n1"),
    "rank 0": (lambda: linear_lora(rank=0), ValueError, "rank of a LoRA must be at least 1.* not 0"),
    "rank -1": (lambda: conv_lora(rank=-1), ValueError, "rank of a LoRA must be at least 1.* not -1"),
    "rank and groups": (lambda: grouped(3), ValueError, "multiple of its 2 groups, not 3"),
    "nan scale": (lambda: linear_lora(scale=math.nan), ValueError, "finite number, not nan"),
    "infinite scale": (lambda: setattr(linear_lora(), "scale", math.inf), ValueError, "finite number, not inf"),
    "scale by adapter": (lambda: setattr(on_linear()[1], "scale", math.nan), ValueError, "finite number, not nan"),
    "nan alpha": (lambda: linear_lora(alpha=math.nan), ValueError, "finite number, not nan"),
    "ranks": (
        lambda: LinearLora.from_weights("a", torch.ones(2, 4), torch.ones(3, 3)),
        ValueError,
        r"\(2, 4\).*\(3, 3\)",
    ),
    "no conv": (
        lambda: Conv2dLora.from_weights("a", torch.ones(2, 4), torch.ones(3, 2)),
        ValueError,
        r"\(2, 4\).*\(3, 2\)",
    ),
    "weights": (
        lambda: linear_lora().load_weights(ones(2, 5), ones(3, 2)),
        ValueError,
        r"\(2, 5\).*\(2, 4\)",
    ),
    "up": (
        lambda: linear_lora().load_weights(ones(2, 4), ones(3, 1)),
        ValueError,
        r"up .*\(3, 1\).*\(3, 2\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_is_explained(fault: str) -> None:
    call, kind, words = FAULTS[fault]
    with pytest.raises(kind, match=words):
        call()


def test_a_refused_lora_or_weight_changes_nothing() -> None:
    chain, adapter = on_linear(2)
    x = torch.randn(5, 4)
    before, output = picture(chain), chain(x)
    lora: Any = adapter.loras["n1"]
    with pytest.raises(ValueError):
        adapter.add_lora(LinearLora("b", 4, 4))
    with pytest.raises(ValueError):
        lora.scale = math.nan
    with pytest.raises(ValueError):
        lora.load_weights(torch.ones(2, 4), torch.ones(3, 5), alpha=7.0)
    assert picture(chain) == before
    assert torch.equal(chain(x), output)


# -- weights


def test_from_weights_takes_the_tensors_as_they_are() -> None:
    down, up = torch.randn(2, 4), torch.randn(3, 2)
    lora = LinearLora.from_weights("a", down, up, scale=0.5, alpha=6.0)
    assert (lora.in_features, lora.out_features, lora.rank, lora.scale) == (4, 3, 2, 0.5)
    assert lora.down.weight.data_ptr() == down.data_ptr() and lora.up.weight.data_ptr() == up.data_ptr()
    assert lora.down.weight.requires_grad
    x = torch.randn(5, 4)
    torch.testing.assert_close(lora(x), 0.5 * 6 / 2 * x @ down.T @ up.T)


@pytest.mark.parametrize(("down_kernel", "up_kernel"), [((1, 1), (3, 3)), ((3, 3), (1, 1)), ((1, 3), (3, 1))])
def test_conv_from_weights_keeps_height_and_width(down_kernel: tuple[int, int], up_kernel: tuple[int, int]) -> None:
    down, up = torch.randn(2, 4, *down_kernel), torch.randn(3, 2, *up_kernel)
    lora = Conv2dLora.from_weights("a", down, up, alpha=1.0)
    x = torch.randn(2, 4, 6, 7)
    assert (lora.in_channels, lora.out_channels, lora.rank) == (4, 3, 2)
    assert lora(x).shape == (2, 3, 6, 7)
    middle = nn.functional.conv2d(x, down, padding=(down_kernel[0] // 2, down_kernel[1] // 2))
    expected = nn.functional.conv2d(middle, up, padding=(up_kernel[0] // 2, up_kernel[1] // 2)) / 2
    torch.testing.assert_close(lora(x), expected, rtol=1e-4, atol=1e-5)


def test_load_weights_copies_in_place() -> None:
    lora, down, up = linear_lora(), torch.randn(2, 4), torch.randn(3, 2)
    places = [tensor.data_ptr() for tensor in (lora.down.weight, lora.up.weight, lora.factor, lora.alpha)]
    lora.load_weights(down, up, alpha=5.0)
    assert places == [tensor.data_ptr() for tensor in (lora.down.weight, lora.up.weight, lora.factor, lora.alpha)]
    assert torch.equal(lora.down.weight, down) and lora.alpha == 5
    x = torch.randn(5, 4)
    torch.testing.assert_close(lora(x), 5 / 2 * x @ down.T @ up.T)
    lora.load_weights(down, up)
    assert lora.alpha == 5


@each_base
@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_dict_updates_the_strength(build: Any, shape: tuple[int, ...], assign: bool) -> None:
    (source, _), (chain, adapter) = build(2, alpha=7.0), build(2, alpha=1.0)
    adapter.scale = 0.5
    checkpoint = source.state_dict()
    chain.load_state_dict(checkpoint, assign=assign)
    x = torch.randn(shape)
    torch.testing.assert_close(chain(x), by_hand(adapter, x), rtol=1e-5, atol=1e-5)
    assert adapter.scales == {"n0": 0.5, "n1": 0.5}
    adapter.scale = 1.0
    torch.testing.assert_close(chain(x), source(x))
    assert all(torch.equal(checkpoint[key], value) for key, value in chain.state_dict().items())


@each_base
def test_a_checkpoint_is_assigned_to_loras_on_the_meta_device(build: Any, shape: tuple[int, ...]) -> None:
    (source, _), (chain, adapter) = build(2, alpha=7.0), build(2)
    chain.to("meta")
    adapter.scale = 0.5
    assert all(tensor.is_meta for tensor in [*chain.parameters(), *chain.buffers()])
    assert chain(torch.randn(shape, device="meta")).is_meta
    chain.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(shape)
    torch.testing.assert_close(chain(x), by_hand(adapter, x), rtol=1e-5, atol=1e-5)
    adapter.scale = 1.0
    torch.testing.assert_close(chain(x), source(x))


def test_a_half_precision_alpha_in_a_file_leaves_the_numbers_in_float32() -> None:
    chain, adapter = on_linear(1)
    checkpoint = {key: value.half() if "alpha" in key else value for key, value in chain.state_dict().items()}
    chain.load_state_dict(checkpoint)
    lora = adapter.loras["n0"]
    assert lora.alpha.dtype == lora.factor.dtype == torch.float32


# -- what changes shows at once


def in_place(lora: Any) -> None:
    with torch.no_grad():
        lora.up.weight.add_(1)


def through_data(lora: Any) -> None:
    lora.up.weight.data.copy_(torch.ones_like(lora.up.weight))  # as averages of weights (EMA) are swapped in


def new_data(lora: Any) -> None:
    lora.down.weight.data = torch.ones_like(lora.down.weight)


def new_parameter(lora: Any) -> None:
    lora.down.weight = nn.Parameter(torch.ones_like(lora.down.weight))


def new_layer(lora: Any) -> None:
    layer = copy.deepcopy(lora.down)
    nn.init.ones_(layer.weight)
    lora.down = layer


def optimizer_step(lora: Any) -> None:
    lora.up.weight.grad = torch.ones_like(lora.up.weight)
    torch.optim.SGD(lora.parameters(), lr=0.5).step()


def loaded_state(lora: Any) -> None:
    lora.load_state_dict({key: torch.full_like(value, 0.5) for key, value in lora.state_dict().items()})


def loaded_weights(lora: Any) -> None:
    lora.load_weights(torch.ones_like(lora.down.weight), torch.ones_like(lora.up.weight), alpha=0.25)


def new_scale(lora: Any) -> None:
    lora.scale = -3.0


def parametrized(lora: Any) -> None:
    parametrizations.weight_norm(lora.down)
    with torch.no_grad():
        lora.down.parametrizations.weight.original0.mul_(3)


CHANGES = [in_place, through_data, new_data, new_parameter, new_layer, optimizer_step, loaded_state, loaded_weights]


@each_base
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("change", [*CHANGES, new_scale, parametrized])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_change_of_one_lora_shows_in_the_next_call(
    build: Any, shape: tuple[int, ...], count: int, change: Callable[[Any], None], mode: Any
) -> None:
    chain, adapter = build(count)
    x = torch.randn(shape)
    with mode():
        before = chain(x)
        assert torch.equal(chain(x), before)
    change(adapter.loras[f"n{count - 1}"])
    with mode():
        after = chain(x)
        torch.testing.assert_close(after, by_hand(adapter, x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)


def test_a_lora_made_in_inference_mode_joins_others_under_no_grad() -> None:
    chain, adapter = on_linear(2)
    x = torch.randn(5, 4)
    with torch.inference_mode():
        adapter.add_lora(linear_lora("late"))
    with torch.no_grad():
        torch.testing.assert_close(chain(x), by_hand(adapter, x))


def test_an_adapter_waiting_on_another_sees_what_that_one_gets() -> None:
    chain, adapter = on_linear(1)
    x = torch.randn(5, 4)
    waiting = LoraAdapter(adapter, linear_lora("outer"))  # pyright: ignore[reportArgumentType]
    adapter.add_lora(linear_lora("late"))
    expected = chain(x) + waiting.loras["outer"](x)
    torch.testing.assert_close(waiting(x), expected)
    waiting.inject()
    torch.testing.assert_close(chain(x), expected)


@pytest.mark.parametrize("which", ["down", "up"])
def test_a_parametrized_lora_trains_through_its_parametrization(which: str) -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    chain, adapter = on_linear(2)
    layer: Any = getattr(adapter.loras["n1"], which)
    x = torch.randn(5, 4)
    base = adapter.base(x) + adapter.loras["n0"](x)
    before = chain(x)
    parametrize.register_parametrization(layer, "weight", Halved())
    torch.testing.assert_close(chain(x), base + (before - base) / 2)
    chain(x).sum().backward()
    assert layer.parametrizations.weight.original.grad.abs().sum() > 0
    parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(chain(x), base + (before - base) / 2)


def test_a_lora_around_a_lora_around_an_adapter_is_ejected_like_any_other() -> None:
    model, x = make_model(), make_input()
    before, output = picture(model), model(x)
    adapters: list[Any] = [lora_on(model.Linear).inject()]
    adapters.append(Side(model[0]).inject())
    adapters.extend(lora_on(model[0]).inject() for _ in range(2))
    for adapter in (adapters[2], adapters[0], adapters[3], adapters[1]):
        adapter.eject()
    assert picture(model) == before
    assert torch.equal(model(x), output)
