"""LoRAs compute what peft's compute, and a stack of them is the plain sum of its parts; outputs and gradients."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from adapter_specimens import Doubled
from delta_specimens import as_torch, assert_close, gradients
from torch import Tensor, nn
from torch.nn import functional as F

import refiners.fluxion.layers as fl
from refiners.adapters import Conv2dLora, LinearLora, Lora, LoraAdapter

with warnings.catch_warnings():  # what others deprecate is not ours to fix
    warnings.simplefilter("ignore")
    from peft import LoraConfig, inject_adapter_in_model


def random_weights(lora: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for layer in (lora.down, lora.up):
        nn.init.normal_(layer.weight, std=0.5, generator=generator)
    return lora


def peft_on(layer: nn.Module, loras: dict[str, Any]) -> tuple[nn.Module, list[Tensor]]:
    """The same layer and the same LoRAs in peft, and their weights in the order down, up, down, up, …"""
    names = list(loras)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = nn.ModuleDict({"layer": as_torch(layer)})
        for name, lora in loras.items():
            config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha.item(), target_modules=["layer"])
            model = inject_adapter_in_model(config, model, adapter_name=name)
        wrapped = model["layer"]
        wrapped.set_adapter(names)
    weights: list[Tensor] = []
    for name, lora in loras.items():
        wrapped.set_scale(name, lora.scale)
        for theirs, ours in ((wrapped.lora_A[name], lora.down), (wrapped.lora_B[name], lora.up)):
            assert theirs.weight.shape == ours.weight.shape
            theirs.weight.data.copy_(ours.weight.data)
            weights.append(theirs.weight.requires_grad_())
    return wrapped, weights


def own_weights(loras: Iterable[Any]) -> list[Tensor]:
    return [layer.weight for lora in loras for layer in (lora.down, lora.up)]


def assert_same(ours: Callable[[Tensor], Tensor], mine: Any, theirs: Any, weights: list[Tensor], x: Tensor) -> None:
    output, slopes = gradients(ours, x, own_weights(mine))
    reference, expected = gradients(theirs, x, weights)
    assert_close(output, reference)
    for slope, other in zip(slopes, expected, strict=True):
        assert_close(slope, other)


# -- peft

LINEARS = [(rank, alpha, scale) for rank in (1, 4, 16) for alpha, scale in ((None, 1.0), (1.0, 0.7), (24.0, -1.3))]


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (2, 1, 3, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rank", "alpha", "scale"), LINEARS)
def test_a_linear_lora_computes_what_peft_computes(
    rank: int, alpha: float | None, scale: float, bias: bool, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(rank + 1)
    layer = fl.Linear(7, 6, bias=bias)
    wrapped = fl.Chain(layer)
    lora = random_weights(LinearLora("a", 7, 6, rank=rank, alpha=alpha, scale=scale), seed=1)
    theirs, weights = peft_on(layer, {"a": lora})
    LoraAdapter(layer, lora).inject(wrapped)
    assert_same(wrapped, [lora], theirs, weights, torch.randn(shape))


CONVS: dict[str, dict[str, Any]] = {
    "1": {"kernel_size": 1},
    "3": {"kernel_size": 3, "padding": 1},
    "3 unpadded": {"kernel_size": 3},
    "(1, 3)": {"kernel_size": (1, 3), "padding": (0, 1)},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "strides": {"kernel_size": (2, 4), "stride": (1, 3), "padding": (0, 2)},
    "wide": {"kernel_size": 5, "padding": 4, "stride": 3},
    "dilation": {"kernel_size": 3, "padding": (2, 3), "dilation": (2, 3)},
    "same": {"kernel_size": 3, "padding": "same"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "everything": {"kernel_size": (3, 2), "padding": (1, 0), "stride": (2, 1), "dilation": (1, 2)},
}
KNOWN_TO_PEFT = ["1", "3", "3 unpadded", "(1, 3)", "stride", "strides", "wide"]


@pytest.mark.parametrize("geometry", KNOWN_TO_PEFT)
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("rank", "alpha", "scale"), [(1, None, 1.0), (4, 3.0, 0.7), (9, 16.0, -0.5)])
def test_a_conv_lora_computes_what_peft_computes(
    rank: int, alpha: float | None, scale: float, use_bias: bool, geometry: str
) -> None:
    torch.manual_seed(rank)
    layer = fl.Conv2d(5, 6, use_bias=use_bias, **CONVS[geometry])
    wrapped = fl.Chain(layer)
    adapter = LoraAdapter(layer, rank=rank, alpha=alpha, scale=scale, name="a")
    random_weights(adapter.loras["a"], seed=2)
    theirs, weights = peft_on(layer, adapter.loras)
    adapter.inject()
    assert_same(wrapped, adapter.loras.values(), theirs, weights, torch.randn(2, 5, 9, 8))


@pytest.mark.parametrize("geometry", CONVS)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_conv_lora_equals_the_convolution_with_updated_weights(geometry: str, groups: int) -> None:
    layer = fl.Conv2d(4, 6, groups=groups, **CONVS[geometry])
    adapter = LoraAdapter(layer, rank=4, scale=0.7, alpha=3.0)
    lora: Any = random_weights(adapter.loras["lora"], seed=3)
    down, up = lora.down.weight, lora.up.weight.flatten(1)
    update = torch.cat([b @ a.flatten(1) for a, b in zip(down.chunk(groups), up.chunk(groups), strict=True)])
    updated = layer.weight + 0.7 * 3 / 4 * update.view_as(layer.weight)
    x = torch.randn(2, 4, 9, 8)
    assert_same(adapter, [lora], lambda x: layer._conv_forward(x, updated, layer.bias), own_weights([lora]), x)


def test_a_lora_may_have_its_big_kernel_on_the_way_up() -> None:
    layer = fl.Conv2d(5, 6, kernel_size=3, padding=1)
    lora = random_weights(Conv2dLora("a", 5, 6, rank=3, alpha=1.5, scale=2.0), seed=3)
    assert (lora.down.kernel_size, lora.up.kernel_size, lora.up.padding) == ((1, 1), (3, 3), (1, 1))
    x = torch.randn(2, 5, 8, 8)

    def plain(x: Tensor) -> Tensor:
        return layer(x) + 2.0 * 1.5 / 3 * F.conv2d(F.conv2d(x, lora.down.weight), lora.up.weight, padding=1)

    assert_same(LoraAdapter(layer, lora), [lora], plain, own_weights([lora]), x)


# -- stacks

RANKS = [4, 1, 7, 2, 3]
LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: fl.Linear(7, 6), (2, 3, 7)),
    "linear without bias": (lambda: fl.Linear(7, 6, bias=False), (5, 7)),
    "conv": (lambda: fl.Conv2d(5, 6, kernel_size=3, padding=1, stride=2), (2, 5, 8, 8)),
    "grouped conv": (lambda: fl.Conv2d(4, 6, kernel_size=3, padding=1, groups=2), (2, 4, 8, 8)),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)
each_count = pytest.mark.parametrize("count", [1, 2, 3, 4, 5])


def some_loras(layer: Any, count: int) -> list[Lora[Any]]:
    ranks = [rank * getattr(layer, "groups", 1) for rank in RANKS[:count]]
    made = [LoraAdapter(layer, rank=rank, name=f"n{rank}") for rank in ranks]
    loras = [adapter.remove_lora(f"n{rank}") for adapter, rank in zip(made, ranks, strict=True)]
    for index, lora in enumerate(loras):
        random_weights(lora, seed=index).scale = 0.5 - 0.3 * index
    return loras


def in_one(layer: Any, loras: list[Lora[Any]]) -> fl.Chain:
    chain = fl.Chain(layer)
    LoraAdapter(layer, *loras).inject()
    return chain


def one_by_one(layer: Any, loras: list[Lora[Any]]) -> fl.Chain:
    chain = fl.Chain(layer)
    adapter = LoraAdapter(layer, loras[0]).inject()
    for lora in loras[1:]:
        adapter.add_lora(lora)
    return chain


def nested_outwards(layer: Any, loras: list[Lora[Any]]) -> fl.Chain:
    chain = fl.Chain(layer)
    for lora in loras:
        LoraAdapter(chain[0], lora).inject()
    return chain


def nested_inwards(layer: Any, loras: list[Lora[Any]]) -> fl.Chain:
    chain = fl.Chain(layer)
    adapters = [LoraAdapter(layer, lora) for lora in loras]
    for adapter in adapters:
        adapter.inject()
    return chain


def mixed(layer: Any, loras: list[Lora[Any]]) -> fl.Chain:
    chain = nested_outwards(layer, loras[::2])
    for lora in loras[1::2]:
        next(chain.layers(LoraAdapter)).add_lora(lora)
    return chain


each_build = pytest.mark.parametrize("build", [in_one, one_by_one, nested_outwards, nested_inwards, mixed])


@each_layer
@each_count
@each_build
def test_a_stack_equals_the_sum_of_its_parts(kind: str, count: int, build: Callable[..., fl.Chain]) -> None:
    layer, x = LAYERS[kind][0](), torch.randn(LAYERS[kind][1])
    loras = some_loras(layer, count)
    chain = build(layer, loras)

    def plain(x: Tensor) -> Tensor:
        factors = [lora.scale * lora.alpha.item() / lora.rank for lora in loras]
        parts = [factor * lora.up(lora.down(x)) for factor, lora in zip(factors, loras, strict=True)]
        return sum(parts, start=layer(x))

    assert_same(chain, loras, plain, own_weights(loras), x)
    with torch.no_grad():
        assert_close(chain(x), plain(x))


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv"])
@each_count
def test_a_stack_computes_what_peft_s_active_adapters_compute(kind: str, count: int) -> None:
    layer, x = LAYERS[kind][0](), torch.randn(LAYERS[kind][1])
    loras = some_loras(layer, count)
    theirs, weights = peft_on(layer, {lora.name: lora for lora in loras})
    assert_same(one_by_one(layer, loras), loras, theirs, weights, x)


def forward_hook(module: nn.Module, calls: list[str]) -> None:
    module.register_forward_hook(lambda *_: calls.append("forward"))


def forward_pre_hook(module: nn.Module, calls: list[str]) -> None:
    module.register_forward_pre_hook(lambda *_: calls.append("forward"))


def backward_hook(module: nn.Module, calls: list[str]) -> None:
    module.register_full_backward_hook(lambda *_: calls.append("backward"))


@each_layer
@each_build
@pytest.mark.parametrize("which", ["lora", "down", "up"])
@pytest.mark.parametrize("hook", [forward_hook, forward_pre_hook, backward_hook])
def test_hooks_on_a_part_fire_and_change_nothing(
    kind: str, build: Callable[..., fl.Chain], which: str, hook: Callable[..., None]
) -> None:
    layer, x = LAYERS[kind][0](), torch.randn(LAYERS[kind][1])
    loras, calls = some_loras(layer, 3), list[str]()
    chain = build(layer, loras)
    reference, expected = gradients(chain, x, own_weights(loras))
    hook(loras[1] if which == "lora" else getattr(loras[1], which), calls)
    output, slopes = gradients(chain, x, own_weights(loras))
    assert len(calls) == 1
    assert_close(output, reference)
    for slope, other in zip(slopes, expected, strict=True):
        assert_close(slope, other)


@each_build
def test_a_hook_may_change_what_a_part_adds(build: Callable[..., fl.Chain]) -> None:
    layer, x = fl.Linear(7, 6), torch.randn(5, 7)
    loras = some_loras(layer, 3)
    chain = build(layer, loras)
    whole = chain(x)
    handle = loras[2].register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    assert_close(chain(x), layer(x) + loras[0](x) + loras[1](x))
    handle.remove()
    assert_close(chain(x), whole)


def test_hooks_on_an_inner_adapter_of_a_stack_fire() -> None:
    layer, x, calls = fl.Linear(7, 6), torch.randn(5, 7), list[str]()
    chain = nested_outwards(layer, some_loras(layer, 3))
    expected = chain(x)
    inner = list(chain.layers(LoraAdapter, recurse=True))[1]
    forward_hook(inner, calls)
    assert_close(chain(x), expected)
    assert calls == ["forward"]


def test_loras_of_other_kinds_of_maps_are_added_as_well() -> None:
    class Halved(LinearLora):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    layer, x = fl.Linear(7, 6), torch.randn(5, 7)
    loras = some_loras(layer, 2)
    halved = random_weights(Halved("halved", 7, 6, rank=2), seed=5)
    expected = layer(x) + loras[0](x) + loras[1](x) + halved.up(halved.down(x)) / 2
    assert_close(in_one(layer, [*loras, halved])(x), expected)


def test_convolutions_of_several_shapes_stack() -> None:
    layer, x = fl.Conv2d(5, 6, kernel_size=3, padding=1), torch.randn(2, 5, 8, 8)
    like_the_layer = some_loras(layer, 2)
    others: list[Any] = [
        Conv2dLora("up", 5, 6, rank=3),
        Conv2dLora("point", 5, 6, rank=2, kernel_size=(1, 1), padding=(0, 0)),
        Conv2dLora("point2", 5, 6, rank=4, kernel_size=(1, 1), padding=(0, 0)),
    ]
    loras = [*like_the_layer, *(random_weights(lora, seed=9) for lora in others)]
    expected = sum((lora(x) for lora in loras), start=layer(x))
    for build in (in_one, nested_outwards, nested_inwards):
        chain = build(layer, loras)
        assert_close(chain(x), expected)
        for adapter in list(chain.layers(LoraAdapter, recurse=True)):
            adapter.eject()
            for name in adapter.names:
                adapter.remove_lora(name)
        chain.pop()


def test_a_lora_around_another_kind_of_adapter_adds_to_its_output() -> None:
    layer, x = fl.Linear(7, 6), torch.randn(5, 7)
    chain, loras = fl.Chain(layer), some_loras(layer, 2)
    LoraAdapter(layer, loras[0]).inject()
    Doubled(chain[0]).inject()
    LoraAdapter(chain[0], loras[1]).inject()
    assert_close(chain(x), 2 * (layer(x) + loras[0](x)) + loras[1](x))
