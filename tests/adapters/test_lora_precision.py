"""LoRAs in every number format and place: factors stay exact, outputs keep the base's format, training is confined."""

import copy
from typing import Any

import pytest
import torch
from adapter_specimens import lora_on, make_input, make_model
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.adapters import LoraAdapter

SHAPES = {"linear": (5, 4), "conv": (2, 4, 6, 6)}
each_kind = pytest.mark.parametrize("kind", SHAPES)
each_count = pytest.mark.parametrize("count", [1, 3])
each_nesting = pytest.mark.parametrize("nested", [False, True])


def adapted(kind: str, count: int, nested: bool = False, dtype: Any = None, lora_dtype: Any = None) -> fl.Chain:
    """Two layers, the first with that many LoRAs of scale 0.1, which no binary format holds exactly."""
    torch.manual_seed(count)
    if kind == "linear":
        chain = fl.Chain(fl.Linear(4, 4, dtype=dtype), fl.Linear(4, 4, dtype=dtype))
    else:
        chain = fl.Chain(*(fl.Conv2d(4, 4, kernel_size=3, padding=1, dtype=dtype) for _ in range(2)))
    for index in range(count):
        outer: Any = chain[0]
        made = lora_on(outer, rank=index + 2, scale=0.1, alpha=3.0, name=f"n{index}", dtype=lora_dtype)
        if nested or not isinstance(outer, LoraAdapter):
            made.inject()
        else:
            outer.add_lora(made.remove_lora(f"n{index}"))
    return chain


def loras_of(chain: fl.Chain) -> list[Any]:
    return [lora for adapter in chain.layers(LoraAdapter, recurse=True) for lora in adapter.loras.values()]


def assert_near(output: Tensor, reference: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    assert output.dtype == dtype
    error = ((output.double() - reference.double()).norm() / reference.double().norm()).item()
    assert error < tolerance, f"relative error {error:.1e}"


@each_kind
@each_count
@each_nesting
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 3e-3), (torch.float64, 1e-6)])
def test_a_moved_lora_keeps_its_numbers_in_float32_and_stays_right(
    kind: str, count: int, nested: bool, dtype: torch.dtype, tolerance: float
) -> None:
    chain, x = adapted(kind, count, nested), torch.randn(SHAPES[kind])
    reference = chain(x)
    chain.to(dtype)
    for index, lora in enumerate(sorted(loras_of(chain), key=lambda lora: lora.rank)):
        assert lora.factor.dtype == lora.alpha.dtype == torch.float32
        assert lora.dtype == dtype
        torch.testing.assert_close(lora.factor, torch.full((index + 2,), 0.1 * 3 / (index + 2)), rtol=1e-6, atol=0)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            assert_near(chain(x.to(dtype)), reference, dtype, tolerance)
    chain.to(torch.float32)
    assert all(lora.alpha == 3.0 for lora in loras_of(chain))
    for lora in loras_of(chain):
        lora.scale = 0.2
        assert lora.factor.dtype == torch.float32


@each_kind
@each_count
@each_nesting
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_loras_on_a_half_precision_base_keep_its_format(
    kind: str, count: int, nested: bool, hooked: bool, dtype: torch.dtype
) -> None:
    chain = adapted(kind, count, nested, dtype=dtype, lora_dtype=torch.float32)
    x = torch.randn(SHAPES[kind], dtype=dtype)
    reference = copy.deepcopy(chain).double()(x.double())
    calls: list[int] = []
    if hooked:
        loras_of(chain)[-1].register_forward_hook(lambda *_: calls.append(1))
    assert_near(chain(x), reference, dtype, 3e-2)
    assert bool(calls) == hooked
    chain(x).sum().backward()
    for lora in loras_of(chain):
        assert lora.up.weight.dtype == lora.up.weight.grad.dtype == torch.float32
        assert lora.up.weight.grad.abs().sum() > 0


@each_kind
@each_count
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
def test_autocast_runs_loras_in_its_format(kind: str, count: int, lora_dtype: torch.dtype) -> None:
    chain, x = adapted(kind, count, lora_dtype=lora_dtype), torch.randn(SHAPES[kind])
    reference = copy.deepcopy(chain).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = chain(x)
        with torch.no_grad():
            assert_near(chain(x), reference, torch.bfloat16, 3e-2)
    assert_near(output, reference, torch.bfloat16, 3e-2)
    output.float().sum().backward()
    assert all(lora.down.weight.grad.dtype == lora_dtype for lora in loras_of(chain))


def test_mixed_formats_in_one_stack_add_up() -> None:
    chain, x = adapted("linear", 2), torch.randn(5, 4)
    reference = chain(x)
    loras_of(chain)[1].to(torch.bfloat16)
    assert_near(chain(x), reference, torch.float32, 3e-2)


@each_kind
@each_count
@pytest.mark.parametrize("lora_dtype", [None, torch.float32])
def test_a_tree_on_the_meta_device_runs_and_comes_to_life_empty(kind: str, count: int, lora_dtype: Any) -> None:
    with torch.device("meta"):
        chain = adapted(kind, count, dtype=torch.bfloat16, lora_dtype=lora_dtype)
    x = torch.empty(SHAPES[kind], dtype=torch.bfloat16, device="meta")
    assert chain(x).is_meta and chain(x).dtype == torch.bfloat16
    chain.to_empty(device="cpu")
    for lora in loras_of(chain):
        torch.testing.assert_close(lora.factor, torch.full((lora.rank,), 0.3 / lora.rank))
        assert lora.alpha == 3.0


@each_kind
@each_count
@each_nesting
def test_a_deep_copy_is_independent_and_exact(kind: str, count: int, nested: bool) -> None:
    chain, x = adapted(kind, count, nested), torch.randn(SHAPES[kind])
    output = chain(x)
    twin = copy.deepcopy(chain)
    assert torch.equal(twin(x), output)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in chain.parameters()}
    for lora in loras_of(twin):
        nn.init.ones_(lora.up.weight)
        lora.scale = 3.0
    assert torch.equal(chain(x), output)
    assert not torch.allclose(twin(x), output)
    for adapter in list(twin.layers(LoraAdapter, recurse=True)):
        adapter.eject()
    assert torch.equal(chain(x), output)


@each_kind
@each_count
@each_nesting
def test_inference_mode_gives_the_same_and_leaves_training_possible(kind: str, count: int, nested: bool) -> None:
    chain, x = adapted(kind, count, nested), torch.randn(SHAPES[kind])
    with torch.no_grad():
        expected = chain(x)
    with torch.inference_mode():
        assert torch.equal(chain(x), expected)
    with torch.no_grad():
        assert torch.equal(chain(x), expected)
    chain(x).sum().backward()
    assert all(lora.down.weight.grad is not None for lora in loras_of(chain))


@pytest.mark.parametrize("count", [1, 2])
def test_training_only_the_loras_moves_no_bit_of_the_base(count: int) -> None:
    model, x = make_model(), make_input()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    output = model(x)
    model.requires_grad_(False)
    targets = [layer for layer in model.layers(fl.Linear)]
    adapters = [LoraAdapter(target, rank=2).inject() for target in targets for _ in range(count)]
    loras = [lora for adapter in adapters for lora in adapter.loras.values()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for lora in loras for p in lora.parameters()}
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
    wanted = torch.randn_like(output)
    losses: list[float] = []
    for _ in range(20):
        loss = (model(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())
    assert not torch.allclose(model(x), output, atol=1e-2)
    for adapter in adapters:
        adapter.eject()
    assert torch.equal(model(x), output)
