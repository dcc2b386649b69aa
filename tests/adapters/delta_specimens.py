"""Layers to update, updates of them in LyCORIS and peft, and what to compare."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.adapters import Delta, DeltaAdapter

with warnings.catch_warnings():  # what others deprecate is not ours to fix
    warnings.simplefilter("ignore")
    from peft import inject_adapter_in_model

TOLERANCE = 1e-5
LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: fl.Linear(12, 20), (6, 5, 12)),
    "linear without bias": (lambda: fl.Linear(12, 20, bias=False), (6, 12)),
    "conv 1x1": (lambda: fl.Conv2d(12, 20, kernel_size=1), (6, 12, 5, 4)),
    "conv 3x3": (lambda: fl.Conv2d(12, 20, kernel_size=3, padding=1), (6, 12, 5, 4)),
    "stride 2": (lambda: fl.Conv2d(12, 20, kernel_size=3, padding=1, stride=2, use_bias=False), (6, 12, 7, 6)),
    "uneven": (lambda: fl.Conv2d(12, 20, kernel_size=(3, 2), padding=(2, 0), dilation=(2, 1)), (6, 12, 7, 6)),
}
OTHER_LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "circular": (lambda: fl.Conv2d(12, 20, kernel_size=3, padding=1, padding_mode="circular"), (6, 12, 5, 4)),
    "groups": (lambda: fl.Conv2d(24, 20, kernel_size=3, padding=1, groups=2), (6, 24, 5, 4)),
}
ALL_LAYERS = LAYERS | OTHER_LAYERS
BATCH = 6


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert theirs.norm() > 1e-3, "a reference of zeros proves nothing"
    error = ((ours - theirs).norm() / theirs.norm()).item()
    assert error <= tolerance, f"relative error {error:.2e}"


def gradients(call: Callable[[Tensor], Tensor], x: Tensor, weights: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output of a call, and the gradients of its input and of weights for a loss that weighs each output anew."""
    x = x.clone().requires_grad_()
    output = call(x)
    target = torch.linspace(-1, 1, output.numel()).view_as(output)
    return output, list(torch.autograd.grad((output * target).sum() + output.square().sum(), [x, *weights]))


def as_torch(layer: Any) -> nn.Module:
    """The same layer, of torch's own class: others build their parts by calling the class of the layer."""
    if isinstance(layer, nn.Linear):
        plain: Any = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    else:
        plain = nn.Conv2d(
            *(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding),
            dilation=layer.dilation,
            bias=layer.bias is not None,
        )
    plain.load_state_dict(layer.state_dict())
    return plain


def with_values(tensors: Iterable[Tensor], seed: int, std: float = 0.5) -> None:
    """Give these tensors random values, in place."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        nn.init.normal_(tensor, std=std, generator=generator)


def with_deltas(layer: Any, *deltas: Delta) -> fl.Chain:
    """A chain of the layer alone, with updates on it."""
    chain = fl.Chain(layer)
    DeltaAdapter(layer, *deltas).inject()
    return chain


def peft_on(layer: Any, config: Any, name: str = "default") -> tuple[nn.Module, dict[str, Tensor]]:
    """The same layer with an update of random values in peft, and the tensors of that by the names peft gives them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = inject_adapter_in_model(config, nn.ModuleDict({"layer": as_torch(layer)}), adapter_name=name)
    wrapped = wrapped["layer"]
    tensors = {part: tensor for part, tensor in wrapped.named_parameters() if name in part.split(".")}
    with_values(tensors.values(), seed=5)
    return wrapped, {part.removesuffix(f".{name}"): tensor.requires_grad_() for part, tensor in tensors.items()}


def assert_same_as(
    theirs: Callable[[Tensor], Tensor], weights: Mapping[str, Tensor], layer: Any, delta: Delta, x: Tensor
) -> None:
    """Compare outputs and the gradients of the input and of these tensors, which are by the names of our parts."""
    parts = delta.parts()
    output, slopes = gradients(with_deltas(layer, delta), x, [parts[part] for part in weights])
    reference, expected = gradients(theirs, x, weights.values())
    assert_close(output, reference)
    for slope, other in zip(slopes, expected, strict=True):
        assert_close(slope, other)
