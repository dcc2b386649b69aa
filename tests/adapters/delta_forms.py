"""Weight updates of every kind but LoRA, in every form and every way to run, for any layer."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from delta_specimens import ALL_LAYERS, with_values
from torch import Tensor, nn

from refiners.adapters import Delta
from refiners.adapters.delta import Scale
from refiners.adapters.dora import Dora
from refiners.adapters.glora import Glora
from refiners.adapters.ia3 import Ia3
from refiners.adapters.loha import Loha
from refiners.adapters.lokr import Lokr
from refiners.adapters.orthogonal import Boft, InputBoft, InputOft, Oft, TurnedOft

LIMIT = 0.03
ALPHA = 1.7
FACTORED: dict[str, tuple[type[Loha | Lokr], dict[str, Any]]] = {
    "LoHa": (Loha, {"rank": 2}),
    "LoHa of Tucker decompositions": (Loha, {"rank": 3, "has_cores": True}),
    "LoKr": (Lokr, {"rank": 2}),
    "LoKr of a Tucker decomposition": (Lokr, {"rank": 1, "has_core": True}),
    "LoKr of whole matrices": (Lokr, {"rank": 16}),
    "LoKr of a small matrix": (Lokr, {"rank": 2, "factor": 2}),
}
WAYS = {"as weight": 0.0, "through factors": float("inf")}  # whatever the size of the layer


def _dora_of_columns(layer: Any, name: str, **where: Any) -> Delta:
    rows = Dora.for_layer(layer, name, rank=2, alpha=ALPHA, **where)
    columns = layer.weight.detach().transpose(0, 1).flatten(1).norm(dim=1)
    magnitude = columns.view(1, -1, *[1] * (layer.weight.ndim - 2)).to(rows.device, rows.dtype)
    return Dora.from_parts(layer, name, rows.parts() | {"magnitude": magnitude}, ALPHA)


def _dora_of_loha(layer: Any, name: str, **where: Any) -> Delta:
    return Dora.around(layer, Loha.for_layer(layer, name, rank=2, alpha=ALPHA, **where))


def _peft_ia3(layer: Any, name: str, **where: Any) -> Delta:
    shape = (20, 1) if isinstance(layer, nn.Linear) else (1, 20, 1, 1)
    return Ia3(layer, name, {"l": torch.ones(shape, **_placed(layer, where))})


def _turned(layer: Any, name: str, **where: Any) -> Delta:
    diag = torch.eye(5, **_placed(layer, where)).repeat(4, 1, 1)
    return TurnedOft(layer, name, {"diag": diag})


def _input_oft(layer: Any, name: str, is_shared: bool = False, **where: Any) -> Delta:
    count = 1 if is_shared else layer.weight[0].numel() // 4
    return InputOft(layer, name, {"blocks": torch.zeros(count, 6, **_placed(layer, where))})


def _input_boft(layer: Any, name: str, **where: Any) -> Delta:
    placed = _placed(layer, where)
    blocks = torch.zeros(2, layer.weight[0].numel() // 6, 6, 6, **placed)
    return InputBoft(layer, name, {"R": blocks, "s": torch.ones(20, 1, **placed)})


def _placed(layer: Any, where: dict[str, Any]) -> dict[str, Any]:
    return {"device": layer.weight.device, "dtype": layer.weight.dtype} | where


def _factored(form: str, way: str) -> Callable[..., Delta]:
    kind, settings = FACTORED[form]

    def make(layer: Any, name: str, **where: Any) -> Delta:
        share = f"{kind.__module__}.{kind.__name__}.largest_share"  # by name, as what is imported here is not checked
        with patch(share, WAYS[way]):
            return kind.for_layer(layer, name, alpha=ALPHA, **settings, **where)

    return make


FORMS: dict[str, Callable[..., Delta]] = {
    "DoRA": lambda layer, name, **where: Dora.for_layer(layer, name, rank=2, alpha=ALPHA, **where),
    "DoRA of a LoHa": _dora_of_loha,
    "DoRA of columns": _dora_of_columns,
    "(IA)^3 of outputs": Ia3.for_layer,
    "(IA)^3 of inputs": lambda layer, name, **where: Ia3.for_layer(layer, name, is_on_input=True, **where),
    "(IA)^3 of peft": _peft_ia3,
    "OFT": lambda layer, name, **where: Oft.for_layer(layer, name, rank=5, **where),
    "OFT with scales": lambda layer, name, **where: Oft.for_layer(layer, name, 5, LIMIT, has_rescale=True, **where),
    "OFT of old files": _turned,
    "BOFT": lambda layer, name, **where: Boft.for_layer(layer, name, rank=10, has_rescale=True, **where),
    "OFT of inputs": _input_oft,
    "OFT of inputs, shared": lambda layer, name, **where: _input_oft(layer, name, is_shared=True, **where),
    "BOFT of inputs": _input_boft,
    "GLoRA": lambda layer, name, **where: Glora.for_layer(layer, name, rank=2, alpha=ALPHA, **where),
    **{f"{form}, {way}": _factored(form, way) for form in FACTORED for way in WAYS},
}


def layer_and_input(kind: str) -> tuple[Any, Tensor]:
    """A layer of random weights, and an input for it."""
    torch.manual_seed(0)
    make, shape = ALL_LAYERS[kind]
    return make(), torch.randn(shape)


def start_of(form: str, layer: Any, name: str = "a", **where: Any) -> Delta:
    """A new update, as training starts with it."""
    return FORMS[form](layer, name, **where)


def made(form: str, layer: Any, name: str = "a", scale: Scale = 1.0, seed: int = 0, **where: Any) -> Delta:
    """An update of random values."""
    delta = start_of(form, layer, name, **where)
    with_values(trained(delta).values(), seed)
    delta.scale = scale
    return delta


def trained(delta: Delta) -> dict[str, Tensor]:
    """The parts that are trained."""
    return {part: tensor for part, tensor in delta.parts().items() if part != "on_input"}


def updated(layer: Any, x: Tensor, *deltas: Delta) -> Tensor:
    """What the layer returns with the weight and the bias that the updates make of its own."""
    weight, bias = layer.weight, layer.bias
    for delta in deltas:
        added = delta.delta_bias(layer.weight, layer.bias)
        weight = weight + delta.delta_weight(layer.weight)
        bias = bias if added is None else bias + added
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    output: Tensor = torch.func.functional_call(layer, tensors, (x,))
    return output
