"""Where it takes less and no gradient is wanted, LoRAs run as part of their layer's weight: the same, sooner."""

from typing import Any

import pytest
import torch
from delta_specimens import assert_close
from test_lora_parity import CONVS, random_weights
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.adapters import Conv2dLora, LoraAdapter

LAYERS: dict[str, Any] = {
    "linear": lambda: fl.Linear(7, 6),
    "wide": lambda: fl.Linear(260, 6, bias=False),
    "torch's": lambda: nn.Linear(7, 6),
    "torch's convolution": lambda: nn.Conv2d(5, 6, 3, padding=1),
    "winograd": lambda: fl.Conv2d(128, 128, 3, padding=1),
    **{name: lambda name=name: fl.Conv2d(5, 6, **CONVS[name]) for name in CONVS},
}


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of LoRAs that were added to a weight, in turn."""
    calls: list[str] = []
    for kind in (fl.Linear, fl.Conv2d):
        cls: Any = type(LoraAdapter(kind(2, 2, 1) if kind is fl.Conv2d else kind(2, 2)).loras["lora"])
        add = cls.added_to_weight
        monkeypatch.setattr(
            cls, "added_to_weight", lambda self, *args, add=add: calls.append(type(self).__name__) or add(self, *args)
        )
    return calls


def adapted(layer: Any, count: int = 1, **options: Any) -> fl.Chain:
    chain = fl.Chain(layer)
    for number in range(count):
        adapter = LoraAdapter(layer, name=f"{number}", rank=2 + number, scale=0.7, alpha=3.0, **options).inject(chain)
        random_weights(adapter.loras[f"{number}"], seed=number)
    return chain


def many_rows(layer: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    inner = layer.weight.shape[1]
    shape = (2, 40, inner) if isinstance(layer, nn.Linear) else (2, inner, 32, 32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_the_same(folded: list[str], name: str, count: int) -> None:
    layer = LAYERS[name]()
    chain, x = adapted(layer, count), many_rows(layer)
    beside = chain(x).detach()
    assert not folded
    with torch.no_grad():
        assert_close(chain(x), beside)
    assert len(folded) == 1
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())


def few_rows() -> tuple[fl.Chain, Tensor]:
    return adapted(fl.Linear(7, 6)), torch.randn(5, 7)


def narrow_numbers() -> tuple[fl.Chain, Tensor]:
    layer = fl.Linear(7, 6, dtype=torch.bfloat16)
    return adapted(layer), many_rows(layer, torch.bfloat16)


def narrow_loras() -> tuple[fl.Chain, Tensor]:
    layer = fl.Linear(7, 6)
    return adapted(layer, dtype=torch.float16), many_rows(layer)


def scale_of_each_sample() -> tuple[fl.Chain, Tensor]:
    layer = fl.Linear(7, 6)
    chain = adapted(layer)
    chain.ensure_find(LoraAdapter).scale = (0.2, 1.5)
    return chain, many_rows(layer)


def hooked_layer() -> tuple[fl.Chain, Tensor]:
    layer = fl.Linear(7, 6)
    layer.register_forward_hook(lambda *_: None)
    return adapted(layer), many_rows(layer)


def groups() -> tuple[fl.Chain, Tensor]:
    layer = fl.Conv2d(4, 6, 3, groups=2)
    return adapted(layer), many_rows(layer).repeat(1, 2, 1, 1)


def another_kernel() -> tuple[fl.Chain, Tensor]:
    layer = fl.Conv2d(4, 6, 3, padding=1)
    down, up = torch.randn(2, 4, 1, 1), torch.randn(6, 2, 1, 1)
    chain = fl.Chain(layer)
    LoraAdapter(layer, Conv2dLora.from_weights("1x1", down, up)).inject(chain)
    return chain, many_rows(layer)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def more_than_its_weight() -> tuple[fl.Chain, Tensor]:
    layer = Doubled(7, 6)
    return adapted(layer), many_rows(layer)


OTHERS = [
    few_rows,
    narrow_numbers,
    narrow_loras,
    scale_of_each_sample,
    hooked_layer,
    groups,
    another_kernel,
    more_than_its_weight,
]


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.__name__)
def test_what_is_not_the_same_or_takes_more_runs_beside_the_layer(folded: list[str], case: Any) -> None:
    chain, x = case()
    expected = chain(x).detach()
    with torch.no_grad():
        assert torch.equal(chain(x), expected)
    assert not folded


def test_autocast_keeps_them_beside_the_layer(folded: list[str]) -> None:
    layer = fl.Linear(7, 6)
    chain, x = adapted(layer), many_rows(layer)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        chain(x)
    assert not folded


def test_it_follows_each_change(folded: list[str]) -> None:
    layer = fl.Linear(7, 6)
    chain, x = adapted(layer), many_rows(layer)
    adapter = chain.ensure_find(LoraAdapter)
    with torch.no_grad():
        at_first = chain(x)
        adapter.scale = 0.0
        assert torch.equal(chain(x), layer(x))
        adapter.scale = 0.7
        assert torch.equal(chain(x), at_first)
        layer.weight.mul_(2)
        beside = layer(x) + adapter.loras["0"](x)
        assert_close(chain(x), beside)
    assert len(folded) == 4
