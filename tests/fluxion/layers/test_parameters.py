"""`Parameter` and `Buffer` hold a tensor per sample; every layer with weights goes where it is told, in what dtype."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import refiners.fluxion.layers as fl
from refiners.fluxion.context import placed

STORED = [fl.Parameter, fl.Buffer]

PLACED: dict[str, Callable[..., Any]] = {
    "Linear": lambda **place: fl.Linear(4, 6, **place),
    "MultiLinear": lambda **place: fl.MultiLinear(4, 6, 5, 3, **place),
    "Conv2d": lambda **place: fl.Conv2d(4, 6, 3, **place),
    "ConvTranspose2d": lambda **place: fl.ConvTranspose2d(4, 6, 3, **place),
    "Embedding": lambda **place: fl.Embedding(7, 4, **place),
    "LayerNorm": lambda **place: fl.LayerNorm(4, **place),
    "GroupNorm": lambda **place: fl.GroupNorm(4, 2, **place),
    "LayerNorm2d": lambda **place: fl.LayerNorm2d(4, **place),
    "RMSNorm": lambda **place: fl.RMSNorm(4, **place),
    "Parameter": lambda **place: fl.Parameter(5, 4, **place),
    "Buffer": lambda **place: fl.Buffer(5, 4, **place),
    "Downsample": lambda **place: fl.Downsample(4, 2, **place),
    "Upsample": lambda **place: fl.Upsample(4, 2, **place),
    "Attention": lambda **place: fl.Attention(4, num_heads=2, **place),
    "SelfAttention": lambda **place: fl.SelfAttention(4, num_heads=2, **place),
    "SelfAttention2d": lambda **place: fl.SelfAttention2d(4, num_heads=2, **place),
}

INPUTS: dict[str, tuple[Tensor, ...]] = {
    **dict.fromkeys(PLACED, (torch.randn(2, 4, 5, 4, generator=torch.Generator().manual_seed(0)),)),
    "Embedding": (torch.tensor([[0, 6, 3]]),),
    "SelfAttention": (torch.ones(2, 3, 4),),
    "Attention": (torch.ones(2, 3, 4),) * 3,
}


@pytest.mark.parametrize("batch_size", [0, 1, 3])
@pytest.mark.parametrize("cls", STORED)
def test_the_tensor_is_given_once_per_sample_of_any_input_without_a_copy(cls: Any, batch_size: int) -> None:
    layer = cls(2, 3)
    for x in (torch.ones(batch_size, 7, 5), torch.zeros(batch_size, dtype=torch.int64)):
        output = layer(x)
        assert output.shape == (batch_size, 2, 3)
        assert all(torch.equal(sample, layer.weight) for sample in output)
        assert output.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("cls", STORED)
def test_a_number_is_given_once_per_sample_too(cls: Any) -> None:
    layer = cls()
    assert layer(torch.ones(3, 5)).tolist() == [layer.weight.item()] * 3


@pytest.mark.parametrize("cls", STORED)
def test_the_tensor_starts_standard_normal(cls: Any) -> None:
    torch.manual_seed(0)
    weight = cls(100, 100).weight
    assert abs(weight.mean().item()) < 0.05
    assert abs(weight.std().item() - 1) < 0.05


@pytest.mark.parametrize("cls", STORED)
def test_the_tensor_is_saved_loaded_moved_and_found_as_weight(cls: Any) -> None:
    layer = cls(2, 3)
    assert list(layer.state_dict()) == ["weight"]
    layer.load_state_dict({"weight": torch.arange(6.0).reshape(2, 3)})
    assert layer(torch.ones(1))[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    layer.to(torch.float64)
    assert (layer.weight.dtype, layer.dtype, layer(torch.ones(1)).dtype) == (torch.float64,) * 3
    assert layer.dims == (2, 3)


def test_a_parameter_is_trained_and_sums_the_gradients_of_the_samples() -> None:
    layer = fl.Parameter(2, 3)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    gradient = torch.arange(24.0).reshape(4, 2, 3)
    layer(torch.ones(4)).backward(gradient)
    assert_close(layer.weight.grad, gradient.sum(0))


def test_a_parameter_can_be_built_frozen_then_thawed_and_frozen_again() -> None:
    layer = fl.Parameter(2, requires_grad=False)
    assert not layer.requires_grad
    assert not layer(torch.ones(1)).requires_grad
    layer.requires_grad = True
    assert layer.requires_grad
    assert layer.weight.requires_grad
    assert isinstance(layer.weight, nn.Parameter)
    layer.requires_grad = False
    assert not layer.weight.requires_grad


def test_a_buffer_is_never_trained() -> None:
    layer = fl.Buffer(2)
    assert list(layer.parameters()) == []
    assert [name for name, _ in layer.named_buffers()] == ["weight"]
    assert not layer(torch.ones(1)).requires_grad


@pytest.mark.parametrize("name", PLACED)
def test_a_layer_lies_where_it_is_told_in_the_dtype_it_is_told(name: str) -> None:
    with placed(device="meta", dtype=torch.bfloat16):
        ambient = PLACED[name]()
    for layer in (PLACED[name](device="meta", dtype=torch.bfloat16), ambient):
        tensors = layer.state_dict()
        assert tensors
        assert {(str(tensor.device), tensor.dtype) for tensor in tensors.values()} == {("meta", torch.bfloat16)}
        assert (str(layer.device), layer.dtype) == ("meta", torch.bfloat16)
    assert PLACED[name]().dtype == torch.float32
    assert str(PLACED[name](device=torch.device("cpu")).device) == "cpu"


@pytest.mark.parametrize("name", PLACED)
def test_a_layer_in_bfloat16_computes_in_bfloat16_what_it_does_in_float32(name: str) -> None:
    layer, precise = PLACED[name](dtype=torch.bfloat16), PLACED[name]()
    precise.load_state_dict(layer.state_dict())
    output = layer(*(x.bfloat16() if x.is_floating_point() else x for x in INPUTS[name]))
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), precise(*INPUTS[name]), atol=0.05, rtol=0.05)


def test_instance_norm_takes_a_place_and_holds_nothing() -> None:
    assert list(fl.InstanceNorm2d(3, device="meta", dtype=torch.bfloat16).state_dict()) == []
