"""The ways in which the CPU computes large layers faster than torch does by itself, against torch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import refiners.fluxion.layers as fl
from refiners.fluxion.layers import linear, winograd


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "padding": (1, 0)}, {"dilation": 2, "padding": 2}])
@pytest.mark.parametrize("size", [(8, 8), (3, 5), (40, 40)])
def test_a_convolution_of_many_weights_equals_torch(options: dict[str, Any], size: tuple[int, int]) -> None:
    """Of small pictures it is computed as a matrix product."""
    torch.manual_seed(0)
    ours, theirs = fl.Conv2d(384, 352, 3, **options), nn.Conv2d(384, 352, 3, **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 384, *size, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours_out, theirs_out = ours(x), theirs(y)
    torch.testing.assert_close(ours_out, theirs_out, rtol=1e-4, atol=1e-5)
    assert ours_out.is_contiguous()
    ours_out.square().mean().backward()
    theirs_out.square().mean().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("has_large_tiles", [True, False])
@pytest.mark.parametrize("most_values", [1, 5000, 2**22])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "padding"),
    [((2, 5, 8, 12), (1, 1)), ((1, 4, 7, 9), (0, 2)), ((3, 6, 3, 5), (2, 0)), ((2, 3, 1, 17), (1, 1))],
)
def test_winograd_equals_the_plain_sum(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    padding: tuple[int, int],
    has_bias: bool,
    most_values: int,
    has_large_tiles: bool,
) -> None:
    """However few tiles and kernels it takes at once."""
    monkeypatch.setattr(winograd, "MOST_VALUES", most_values)
    monkeypatch.setattr(winograd, "MOST_KERNEL_VALUES", most_values)
    monkeypatch.setattr(
        winograd, "_choose_transforms", lambda *_: winograd.LARGE if has_large_tiles else winograd.SMALL
    )
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator) for size in (shape, (7, shape[1], 3, 3)))
    bias = torch.randn(7, generator=generator) if has_bias else None
    output = winograd.convolve(x, weight, bias, padding)
    expected = functional.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=padding)
    assert output.shape == expected.shape and output.is_contiguous()
    assert relative_error(output, expected) < (5e-6 if has_large_tiles else 1e-6)


@pytest.mark.parametrize("has_gradients", [True, False])
def test_a_convolution_of_many_positions_takes_winograds_way_where_no_gradient_is_wanted(
    monkeypatch: pytest.MonkeyPatch, has_gradients: bool
) -> None:
    calls: list[Any] = []
    convolve = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *arguments: calls.append(arguments) or convolve(*arguments))
    torch.manual_seed(0)
    layer, x = fl.Conv2d(128, 128, 3, padding=1), torch.randn(2, 128, 32, 16)
    with torch.set_grad_enabled(has_gradients):
        output = layer(x)
    assert len(calls) == (not has_gradients)
    assert relative_error(output, functional.conv2d(x, layer.weight, layer.bias, padding=1)) < 5e-6


@pytest.mark.parametrize(
    "change",
    [
        {"kernel_size": 1, "padding": 0},
        {"kernel_size": 5},
        {"stride": 2},
        {"dilation": 2},
        {"groups": 2},
        {"padding": "same"},
        {"padding_mode": "reflect"},
        {"dtype": torch.float64},
    ],
)
def test_other_convolutions_are_torchs_own_bit_for_bit(change: dict[str, Any]) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"kernel_size": 3, "padding": 1, **change}
    layer = fl.Conv2d(128, 128, **options)
    x = torch.randn(1, 128, 36, 36, dtype=options.get("dtype"))
    with torch.no_grad():
        assert torch.equal(layer(x), nn.Conv2d.forward(layer, x))


def test_winograd_can_be_mapped() -> None:
    torch.manual_seed(0)
    layer, x = fl.Conv2d(128, 128, 3, padding=1), torch.randn(3, 1, 128, 32, 32)
    with torch.no_grad():
        mapped = torch.vmap(layer)(x)
        assert relative_error(mapped, torch.stack([layer(each) for each in x])) < 1e-5


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    "view", ["plain", "transposed", "strided", "expanded", "one row", "four dimensions", "no rows"]
)
def test_a_large_linear_layer_without_gradients_equals_torch(view: str, has_bias: bool) -> None:
    torch.manual_seed(0)
    layer, width = fl.Linear(384, 320, bias=has_bias), linear.FEWEST_FEATURES
    assert layer.in_features >= width
    x = {
        "plain": torch.randn(2, 7, 384),
        "transposed": torch.randn(7, 2, 384).transpose(0, 1),
        "strided": torch.randn(2, 7, 768)[..., ::2],
        "expanded": torch.randn(1, 1, 384).expand(2, 7, 384),
        "one row": torch.randn(384),
        "four dimensions": torch.randn(2, 3, 4, 384),
        "no rows": torch.randn(0, 384),
    }[view]
    expected = functional.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        output = layer(x)
    assert output.shape == expected.shape
    torch.testing.assert_close(output, expected.detach(), rtol=1e-5, atol=1e-5)
