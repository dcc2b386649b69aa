"""Layers that do not train give the gradients of torch's own, and keep nothing for it but what is there anyway."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

import refiners.fluxion.layers as fl

# Sizes that torch convolves, and those that go as a product (few positions, many weights) or Winograd's way (many).
CONVOLUTIONS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "3x3": ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1}, (2, 4, 7, 5)),
    "1x1": ({"in_channels": 4, "out_channels": 6, "kernel_size": 1}, (2, 4, 7, 5)),
    "without bias": ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "use_bias": False}, (2, 4, 7, 5)),
    "stride": ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2, "padding": (0, 1)}, (2, 4, 8, 9)),
    "dilation": ({"in_channels": 4, "out_channels": 6, "kernel_size": (1, 3), "dilation": 2}, (2, 4, 7, 6)),
    "groups": ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2}, (2, 4, 7, 5)),
    "no batch": ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1}, (4, 7, 5)),
    "wrapped": ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding_mode": "circular"}, (2, 4, 7, 5)),
    "same size": ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": "same"}, (2, 4, 7, 5)),
    "product": ({"in_channels": 256, "out_channels": 512, "kernel_size": 3, "padding": 1}, (2, 256, 4, 5)),
    "product, stride": ({"in_channels": 256, "out_channels": 512, "kernel_size": 3, "stride": 2}, (2, 256, 9, 8)),
    "Winograd": ({"in_channels": 128, "out_channels": 136, "kernel_size": 3, "padding": 1}, (2, 128, 33, 32)),
    "Winograd, cut": ({"in_channels": 128, "out_channels": 136, "kernel_size": 3, "padding": (0, 2)}, (1, 128, 30, 40)),
}  # fmt: skip
GATES = [fl.GeLU(), fl.GeLU(fl.GeLUApproximation.TANH), fl.GeLU(fl.GeLUApproximation.SIGMOID), fl.SiLU()]


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


def gradient(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and what comes back for a gradient that is no constant."""
    x = x.clone().requires_grad_()
    output = call(x)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return output.detach(), torch.autograd.grad((output * weights).sum(), x)[0]


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_gradient_through_a_frozen_convolution_is_torchs(name: str) -> None:
    torch.manual_seed(0)
    settings, size = CONVOLUTIONS[name]
    layer: Any = frozen(fl.Conv2d(**settings))
    x = torch.randn(size)
    results = gradient(layer, x), gradient(lambda x: nn.Conv2d.forward(layer, x), x)
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected)


@pytest.mark.parametrize("size", [(300,), (5, 300), (2, 3, 300)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_through_a_frozen_linear_layer_is_torchs(size: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer: Any = frozen(fl.Linear(300, 40, bias=bias))
    x = torch.randn(size)
    results = gradient(layer, x), gradient(lambda x: functional.linear(x, layer.weight, layer.bias), x)
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected)


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_the_gradient_through_a_gated_unit_is_torchs(gate: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10)

    def plain(x: Tensor) -> Tensor:
        output, gated = x.chunk(2, dim=-1)
        return output * gate(gated)

    for found, expected in zip(gradient(fl.GLU(gate), x), gradient(plain, x), strict=True):
        assert_near(found, expected)


def small() -> fl.Chain:
    torch.manual_seed(0)
    layers = fl.Conv2d(2, 256, kernel_size=3, padding=1), fl.Lambda(lambda x: x.flatten(2).transpose(1, 2))
    return fl.Chain(*layers, fl.Linear(256, 8), fl.GLU(fl.GeLU())).requires_grad_(False)


def test_a_gradient_of_a_gradient_is_that_of_layers_that_train() -> None:
    results: list[Tensor] = []
    for trains in (False, True):
        chain, x = small().requires_grad_(trains), torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        (first,) = torch.autograd.grad(chain(x).square().sum(), x, create_graph=True)
        results += torch.autograd.grad(first.square().sum(), x)
    assert_near(*results)


def test_a_gradient_for_each_sample_by_vmap_is_that_of_each_alone() -> None:
    chain, x = small(), torch.randn(3, 2, 4, 4)

    def loss(x: Tensor) -> Tensor:
        return chain(x[None]).square().sum()

    each = torch.func.vmap(torch.func.grad(loss))(x)
    assert_near(each, torch.stack([torch.func.grad(loss)(sample) for sample in x]))


def test_under_autocast_the_gradient_is_torchs_and_of_the_inputs_precision() -> None:
    results: list[Tensor] = []
    for trains in (False, True):
        chain, x = small().requires_grad_(trains), torch.ones(1, 2, 3, 3, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            output = chain(x)
        assert output.dtype == torch.bfloat16
        results += torch.autograd.grad(output.float().square().sum(), x)
    assert results[0].dtype == torch.float32
    assert (results[0] - results[1]).norm() < 0.02 * results[1].norm()


def kept(layer: nn.Module, x: Tensor) -> set[int]:
    """The memory that the graph of a forward pass keeps."""
    places: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        places.add(tensor.untyped_storage().data_ptr())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return places


@pytest.mark.parametrize(
    ("layer", "size"),
    [(fl.Conv2d(2, 3, kernel_size=3), (1, 2, 5, 5)), (fl.Linear(256, 3), (4, 256))],
    ids=["Conv2d", "Linear"],
)
def test_a_frozen_layer_keeps_its_weight_alone(layer: fl.WeightedModule, size: tuple[int, ...]) -> None:
    x = torch.randn(size, requires_grad=True)
    weight, place = layer.weight.untyped_storage().data_ptr(), x.untyped_storage().data_ptr()
    assert place in kept(layer, x)
    assert kept(frozen(layer), x) == {weight}


def test_a_gated_unit_keeps_its_input_alone() -> None:
    x = torch.randn(2, 6, requires_grad=True)
    assert kept(fl.GLU(fl.GeLU()), x) == {x.untyped_storage().data_ptr()}


def test_a_weight_that_was_changed_before_the_backward_pass_is_an_error() -> None:
    layer: Any = frozen(fl.Conv2d(2, 3, kernel_size=3))
    output = layer(torch.randn(1, 2, 5, 5, requires_grad=True))
    layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_hooks_on_the_activation_of_a_gated_unit_are_called() -> None:
    gate, calls = fl.GeLU(), list[Tensor]()
    gate.register_forward_hook(lambda module, inputs, output: calls.append(output))
    fl.GLU(gate)(torch.randn(2, 6, requires_grad=True))
    assert len(calls) == 1
