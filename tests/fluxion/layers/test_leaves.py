"""Every leaf layer computes what torch's own does, forwards and backwards, from the same weights."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Size, Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import refiners.fluxion.layers as fl
from refiners.fluxion.context import placed


class Function(nn.Module):
    """A function of torch as a module, to stand on the other side of a comparison."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Tensor:
        return self.function(*inputs)


class ChannelNorm(nn.LayerNorm):
    """nn.LayerNorm over the channels of a picture."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Case:
    """One layer with its options, and what it should equal. `scale` is that of the input: small, so that eps shows."""

    ours: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module | Callable[..., Any]]
    shape: tuple[int, ...]
    more_inputs: tuple[Any, ...] = ()
    scale: float = 1.0


WEIGHTED = {
    "linear": Case(lambda: fl.Linear(4, 6), lambda: nn.Linear(4, 6), (2, 3, 4)),
    "linear without bias": Case(lambda: fl.Linear(4, 6, bias=False), lambda: nn.Linear(4, 6, bias=False), (5, 4)),
    "conv": Case(lambda: fl.Conv2d(4, 6, 3), lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 5)),
    "conv with pairs": Case(
        lambda: fl.Conv2d(4, 6, kernel_size=(3, 2), stride=(2, 1), padding=(1, 3), dilation=(1, 2)),
        lambda: nn.Conv2d(4, 6, kernel_size=(3, 2), stride=(2, 1), padding=(1, 3), dilation=(1, 2)),
        (2, 4, 7, 5),
    ),
    "conv in groups": Case(
        lambda: fl.Conv2d(4, 6, kernel_size=3, groups=2, use_bias=False),
        lambda: nn.Conv2d(4, 6, kernel_size=3, groups=2, bias=False),
        (2, 4, 7, 5),
    ),
    "conv padded same": Case(
        lambda: fl.Conv2d(4, 6, 3, padding="same"), lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 7, 5)
    ),
    "conv padded by mirror": Case(
        lambda: fl.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
        lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
        (2, 4, 7, 5),
    ),
    "transposed conv": Case(lambda: fl.ConvTranspose2d(4, 6, 3), lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 3)),
    "transposed conv with pairs": Case(
        lambda: fl.ConvTranspose2d(
            4, 6, kernel_size=(3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(1, 2)
        ),
        lambda: nn.ConvTranspose2d(
            4, 6, kernel_size=(3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(1, 2)
        ),
        (2, 4, 5, 3),
    ),
    "transposed conv in groups": Case(
        lambda: fl.ConvTranspose2d(4, 6, kernel_size=2, groups=2, use_bias=False),
        lambda: nn.ConvTranspose2d(4, 6, kernel_size=2, groups=2, bias=False),
        (2, 4, 5, 3),
    ),
    "layer norm": Case(lambda: fl.LayerNorm(4), lambda: nn.LayerNorm(4), (2, 3, 4), scale=0.01),
    "layer norm of two dimensions": Case(
        lambda: fl.LayerNorm([3, 4], eps=0.1), lambda: nn.LayerNorm([3, 4], eps=0.1), (2, 3, 4)
    ),
    "layer norm without bias": Case(
        lambda: fl.LayerNorm(4, bias=False), lambda: nn.LayerNorm(4, bias=False), (2, 3, 4)
    ),
    "group norm": Case(
        lambda: fl.GroupNorm(channels=6, num_groups=2), lambda: nn.GroupNorm(2, 6), (2, 6, 3, 5), scale=0.01
    ),
    "group norm with eps": Case(lambda: fl.GroupNorm(6, 3, eps=0.1), lambda: nn.GroupNorm(3, 6, eps=0.1), (2, 6, 5)),
    "layer norm of channels": Case(
        lambda: fl.LayerNorm2d(4), lambda: ChannelNorm(4, eps=1e-6), (2, 4, 3, 5), scale=0.003
    ),
    "layer norm of channels with eps": Case(
        lambda: fl.LayerNorm2d(4, eps=0.1), lambda: ChannelNorm(4, eps=0.1), (2, 4, 3, 5)
    ),
    "rms norm": Case(lambda: fl.RMSNorm(4), lambda: nn.RMSNorm(4, eps=1e-6), (2, 3, 4), scale=0.003),
    "rms norm of two dimensions": Case(
        lambda: fl.RMSNorm([3, 4], eps=0.1), lambda: nn.RMSNorm([3, 4], eps=0.1), (2, 3, 4)
    ),
}

WEIGHTLESS = {
    "instance norm": Case(lambda: fl.InstanceNorm2d(4), lambda: nn.InstanceNorm2d(4), (2, 4, 3, 5), scale=0.01),
    "instance norm with eps": Case(
        lambda: fl.InstanceNorm2d(4, eps=0.1), lambda: nn.InstanceNorm2d(4, eps=0.1), (2, 4, 3, 5)
    ),
    "silu": Case(fl.SiLU, nn.SiLU, (2, 3)),
    "relu": Case(fl.ReLU, nn.ReLU, (2, 3), scale=10.0),
    "sigmoid": Case(fl.Sigmoid, nn.Sigmoid, (2, 3)),
    "gelu": Case(fl.GeLU, nn.GELU, (2, 3)),
    "gelu by tanh": Case(
        lambda: fl.GeLU(approximation=fl.GeLUApproximation.TANH), lambda: nn.GELU(approximate="tanh"), (2, 3)
    ),
    "gelu by sigmoid": Case(
        lambda: fl.GeLU(fl.GeLUApproximation.SIGMOID), lambda: lambda x: x / (1 + torch.exp(-1.702 * x)), (2, 3)
    ),
    "glu": Case(lambda: fl.GLU(fl.Sigmoid()), nn.GLU, (2, 3, 6)),
    "glu with gelu": Case(lambda: fl.GLU(fl.GeLU()), lambda: lambda x: x[..., :3] * F.gelu(x[..., 3:]), (2, 5, 6)),
    "sin": Case(fl.Sin, lambda: torch.sin, (2, 3)),
    "cos": Case(fl.Cos, lambda: torch.cos, (2, 3)),
    "multiply": Case(lambda: fl.Multiply(scale=-2.0, bias=0.5), lambda: lambda x: x * -2 + 0.5, (2, 3)),
    "multiply by default": Case(fl.Multiply, nn.Identity, (2, 3)),
    "identity": Case(fl.Identity, nn.Identity, (2, 3)),
    "reshape": Case(lambda: fl.Reshape(4, 3), lambda: lambda x: x.reshape(2, 4, 3), (2, 3, 4)),
    "reshape to a free size": Case(lambda: fl.Reshape(2, -1), lambda: lambda x: x.reshape(2, 2, 6), (2, 3, 4)),
    "view": Case(lambda: fl.View(6, -1), lambda: lambda x: x.view(6, 4), (2, 3, 4)),
    "flatten": Case(fl.Flatten, lambda: nn.Flatten(0), (2, 3, 4, 5)),
    "flatten some": Case(lambda: fl.Flatten(start_dim=1, end_dim=2), lambda: nn.Flatten(1, 2), (2, 3, 4, 5)),
    "unflatten": Case(
        lambda: fl.Unflatten(dim=-1), lambda: lambda x, sizes: x.unflatten(-1, sizes), (2, 6), (Size([2, 3]),)
    ),
    "transpose": Case(lambda: fl.Transpose(0, -1), lambda: lambda x: x.transpose(0, -1), (2, 3, 4)),
    "permute": Case(lambda: fl.Permute(2, 0, 1), lambda: lambda x: x.permute(2, 0, 1), (2, 3, 4)),
    "squeeze": Case(lambda: fl.Squeeze(1), lambda: lambda x: x.squeeze(1), (1, 1, 3)),
    "squeeze what is not 1": Case(lambda: fl.Squeeze(-1), nn.Identity, (1, 1, 3)),
    "unsqueeze": Case(lambda: fl.Unsqueeze(-1), lambda: lambda x: x.unsqueeze(-1), (2, 3)),
    "slicing": Case(lambda: fl.Slicing(dim=-2, start=-4, end=-1, step=2), lambda: lambda x: x[:, -4:-1:2], (2, 5, 3)),
    "slicing by default": Case(fl.Slicing, nn.Identity, (2, 5)),
    "interpolate by factor": Case(lambda: fl.Interpolate(factor=2), lambda: nn.Upsample(scale_factor=2), (1, 2, 3, 5)),
    "interpolate to a size": Case(
        fl.Interpolate, lambda: lambda x, size: F.interpolate(x, tuple(size)), (1, 2, 3, 5), (Size([7, 4]),)
    ),
    "interpolate bilinear": Case(
        lambda: fl.Interpolate(mode="bilinear", factor=1.5),
        lambda: lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
        (1, 2, 4, 6),
    ),
    "interpolate antialiased": Case(
        lambda: fl.Interpolate("bicubic", antialias=True),
        lambda: lambda x, size: F.interpolate(x, tuple(size), mode="bicubic", antialias=True),
        (1, 2, 9, 8),
        (Size([4, 3]),),
    ),
    "pixel unshuffle": Case(lambda: fl.PixelUnshuffle(downscale_factor=2), lambda: nn.PixelUnshuffle(2), (1, 2, 4, 6)),
    "mirror pad": Case(lambda: fl.ReflectionPad2d(2), lambda: nn.ReflectionPad2d(2), (1, 2, 4, 5)),
    "mirror pad by side": Case(
        lambda: fl.ReflectionPad2d((1, 2, 3, 0)), lambda: nn.ReflectionPad2d((1, 2, 3, 0)), (1, 2, 4, 5)
    ),
    "max pool 1d": Case(lambda: fl.MaxPool1d(2), lambda: nn.MaxPool1d(2), (2, 3, 7)),
    "max pool 1d with options": Case(
        lambda: fl.MaxPool1d(3, stride=2, padding=1, dilation=2, ceil_mode=True),
        lambda: nn.MaxPool1d(3, stride=2, padding=1, dilation=2, ceil_mode=True),
        (2, 3, 10),
    ),
    "avg pool 2d": Case(lambda: fl.AvgPool2d(2), lambda: nn.AvgPool2d(2), (1, 2, 7, 5)),
    "avg pool 2d with options": Case(
        lambda: fl.AvgPool2d((3, 2), stride=(2, 1), padding=1, ceil_mode=True),
        lambda: nn.AvgPool2d((3, 2), stride=(2, 1), padding=1, ceil_mode=True),
        (1, 2, 8, 5),
    ),
    "max pool 2d": Case(lambda: fl.MaxPool2d(kernel_size=2), lambda: nn.MaxPool2d(2), (1, 2, 7, 5)),
    "max pool 2d with options": Case(
        lambda: fl.MaxPool2d((3, 2), stride=(2, 1), padding=1, dilation=(1, 2), ceil_mode=True),
        lambda: nn.MaxPool2d((3, 2), stride=(2, 1), padding=1, dilation=(1, 2), ceil_mode=True),
        (1, 2, 8, 5),
    ),
}

CASES = WEIGHTED | WEIGHTLESS


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(layer: nn.Module, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of the input and of each weight for a random gradient of the output."""
    x = (case.scale * random(*case.shape)).requires_grad_()
    output = layer(x, *case.more_inputs)
    leaves = {"input": x, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad(output, list(leaves.values()), random(*output.shape, seed=1))
    return output, dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_those_of_torch(name: str) -> None:
    case = CASES[name]
    with placed(dtype=torch.float64):
        ours, theirs = case.ours(), case.theirs()
    reference = theirs if isinstance(theirs, nn.Module) else Function(theirs)
    weights = {key: random(*value.shape, seed=2) for key, value in reference.state_dict().items()}
    reference.load_state_dict(weights)
    ours.load_state_dict(weights)
    assert bool(weights) == (name in WEIGHTED)
    output, gradients = run(ours, case)
    expected_output, expected_gradients = run(reference, case)
    assert_close(output, expected_output)
    assert_close(gradients, expected_gradients)


def test_every_leaf_without_a_test_of_its_own_has_a_case() -> None:
    elsewhere = (fl.Chain, fl.ContextModule, fl.Return, fl.GetArg, fl.Lambda, fl.Breakpoint)
    elsewhere += (fl.Parameter, fl.Buffer, fl.Embedding, fl.ScaledDotProductAttention)
    exported = [getattr(fl, name) for name in fl.__all__]
    layers = {cls for cls in exported if isinstance(cls, type) and issubclass(cls, fl.Module)}
    leaves = {cls for cls in layers if not issubclass(cls, elsewhere)} - {fl.Module, fl.WeightedModule, fl.Activation}
    assert leaves == {type(case.ours()) for case in CASES.values()}


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_embedding_equals_torch_in_output_and_gradient(shape: tuple[int, ...]) -> None:
    ours = fl.Embedding(num_embeddings=7, embedding_dim=4, dtype=torch.float64)
    reference = nn.Embedding(7, 4, dtype=torch.float64)
    reference.load_state_dict(ours.state_dict())
    ids = torch.randint(7, shape, generator=torch.Generator().manual_seed(0))
    assert_close(ours(ids), reference(ids))
    ours(ids).pow(2).sum().backward()
    reference(ids).pow(2).sum().backward()
    assert_close(ours.weight.grad, reference.weight.grad)


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_multi_linear_is_linear_layers_with_relu_between(num_layers: int) -> None:
    ours = fl.MultiLinear(input_dim=3, output_dim=2, inner_dim=5, num_layers=num_layers, dtype=torch.float64)
    widths = [3, *[5] * (num_layers - 1), 2]
    pairs = list(pairwise(widths))
    reference = nn.Sequential(*[m for pair in pairs for m in (nn.Linear(*pair), nn.ReLU())][:-1]).double()
    for parameter, other in zip(reference.parameters(), ours.parameters(), strict=True):
        parameter.data.copy_(other)
    case = Case(lambda: ours, lambda: reference, (4, 3))
    (output, gradients), (expected_output, expected_gradients) = run(ours, case), run(reference, case)
    assert_close(output, expected_output)
    assert_close(list(gradients.values()), list(expected_gradients.values()))
    assert [layer.weight.shape for layer in ours.layers(fl.Linear)] == [pair[::-1] for pair in pairs]


@settings(deadline=None)
@given(
    dim=st.integers(-3, 2),
    start=st.integers(-6, 6),
    end=st.none() | st.integers(-6, 6),
    step=st.integers(1, 6),
)
def test_slicing_takes_what_the_slice_of_a_list_takes(dim: int, start: int, end: int | None, step: int) -> None:
    x = torch.arange(60).reshape(3, 4, 5)
    kept = list(range(x.shape[dim]))[start:end:step]
    assert torch.equal(fl.Slicing(dim, start, end, step)(x), x.index_select(dim, torch.tensor(kept, dtype=torch.long)))


@pytest.mark.parametrize("return_indices", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), [(fl.MaxPool1d, nn.MaxPool1d), (fl.MaxPool2d, nn.MaxPool2d)])
def test_max_pool_can_return_where_the_largest_was(ours: Any, theirs: Any, return_indices: bool) -> None:
    x = random(1, 4, 6)
    assert_close(ours(2, return_indices=return_indices)(x), theirs(2, return_indices=return_indices)(x))


def test_view_shares_memory_and_refuses_to_copy_where_reshape_copies() -> None:
    x = random(2, 3, 4)
    assert fl.View(6, 4)(x).data_ptr() == x.data_ptr()
    with pytest.raises(RuntimeError, match="view"):
        fl.View(2, 12)(x.transpose(1, 2))
    assert torch.equal(fl.Reshape(12)(x.transpose(1, 2)), x.transpose(1, 2).flatten(1))


def test_linear_follows_a_parametrization_of_its_weight() -> None:
    layer = fl.Linear(3, 3)
    nn.utils.parametrizations.orthogonal(layer)
    assert_close(layer(torch.eye(3)) - layer.bias, layer.weight.mT)
    assert_close(layer.weight @ layer.weight.mT, torch.eye(3))


def test_linear_computes_with_weights_lent_by_functional_call() -> None:
    layer, x = fl.Linear(3, 2), torch.ones(1, 3)
    lent = {"weight": torch.full((2, 3), 2.0), "bias": torch.tensor([1.0, -1.0])}
    assert torch.func.functional_call(layer, lent, (x,)).tolist() == [[7.0, 5.0]]
    assert not torch.equal(layer(x), torch.tensor([[7.0, 5.0]]))


MISUSES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "odd glu": (lambda: fl.GLU(fl.SiLU())(torch.ones(2, 5)), ValueError, r"must be even, but got shape \(2, 5\)"),
    "unknown gelu": (lambda: fl.GeLU("erf"), ValueError, "'erf' is not a valid GeLUApproximation"),  # type: ignore
    "slicing by step 0": (lambda: fl.Slicing(step=0), ValueError, "step of at least 1, not 0"),
    "slicing backwards": (lambda: fl.Slicing(step=-1), ValueError, "step of at least 1, not -1"),
    "slicing beyond the dimensions": (lambda: fl.Slicing(dim=2)(torch.ones(3, 4)), IndexError, "(?i)dim"),
    "slicing before the dimensions": (lambda: fl.Slicing(dim=-3)(torch.ones(3, 4)), IndexError, "(?i)dim"),
    "slicing a number": (lambda: fl.Slicing()(torch.tensor(1.0)), IndexError, "(?i)dim"),
    "no layers": (lambda: fl.MultiLinear(2, 2, 2, num_layers=0), ValueError, "at least 1 layer, not 0"),
    "no shape": (lambda: fl.Interpolate()(torch.ones(1, 1, 2, 2)), ValueError, "either .* second input.* or a factor"),
    "two shapes": (
        lambda: fl.Interpolate(factor=2.0)(torch.ones(1, 1, 2, 2), Size([3, 3])),
        ValueError,
        "either .* second input.* or a factor",
    ),
    "channels of a norm": (lambda: fl.LayerNorm2d(3)(torch.ones(1, 2, 3, 3)), RuntimeError, "3"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_told_in_a_clear_error(name: str) -> None:
    misuse, error, message = MISUSES[name]
    with pytest.raises(error, match=message):
        misuse()


REPRS = {
    "Linear(in_features=2, out_features=3, bias=False)": lambda: fl.Linear(2, 3, bias=False),
    "LayerNorm2d(3, eps=1e-06)": lambda: fl.LayerNorm2d(3),
    "Parameter(2, 3)": lambda: fl.Parameter(2, 3),
    "Buffer(2, 3)": lambda: fl.Buffer(2, 3),
    "Multiply(scale=2.0, bias=0.0)": lambda: fl.Multiply(2.0),
    "Reshape(shape=(2, -1))": lambda: fl.Reshape(2, -1),
    "View(shape=(2, -1))": lambda: fl.View(2, -1),
    "Flatten(start_dim=1, end_dim=-1)": lambda: fl.Flatten(1),
    "Unflatten(dim=1)": lambda: fl.Unflatten(1),
    "Transpose(dim0=1, dim1=2)": lambda: fl.Transpose(1, 2),
    "Permute(dims=(0, 2, 1))": lambda: fl.Permute(0, 2, 1),
    "Squeeze(dim=1)": lambda: fl.Squeeze(1),
    "Unsqueeze(dim=1)": lambda: fl.Unsqueeze(1),
    "Slicing(dim=1, start=2, end=None, step=1)": lambda: fl.Slicing(1, 2),
    "GeLU()": lambda: fl.GeLU(),
    "GeLU(approximation='tanh')": lambda: fl.GeLU(fl.GeLUApproximation.TANH),
    "Interpolate(mode='area', factor=0.5)": lambda: fl.Interpolate("area", factor=0.5),
    "GetArg(1)": lambda: fl.GetArg(1),
    "Lambda(random(*shape: int, seed: int = 0) -> torch.Tensor)": lambda: fl.Lambda(random),
    "Lambda(sin)": lambda: fl.Lambda(torch.sin),
    "ScaledDotProductAttention(num_heads=2, is_causal=True)": lambda: fl.ScaledDotProductAttention(2, is_causal=True),
    "Converter(set_device=False, set_dtype=True)": lambda: fl.Converter(set_device=False),
    "UseContext(context='side', key='text')": lambda: fl.UseContext("side", "text"),
    "SetContext(context='side', key='text')": lambda: fl.SetContext("side", "text"),
}


@pytest.mark.parametrize("expected", REPRS)
def test_a_leaf_prints_its_options(expected: str) -> None:
    assert repr(REPRS[expected]()) == expected
