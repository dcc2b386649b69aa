"""LoHas and LoKrs in every form, with random values, for any layer."""

from typing import Any

import torch
from delta_specimens import ALL_LAYERS, with_values
from torch import Tensor

from refiners.adapters.delta import Scale
from refiners.adapters.factored import FactoredDelta
from refiners.adapters.loha import Loha
from refiners.adapters.lokr import Lokr

ALPHA = 1.7
SETTINGS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "LoHa": (Loha, {"rank": 2}),
    "LoHa of Tucker decompositions": (Loha, {"rank": 3, "has_cores": True}),
    "LoKr": (Lokr, {"rank": 2}),
    "LoKr of a Tucker decomposition": (Lokr, {"rank": 1, "has_core": True}),
    "LoKr of whole matrices": (Lokr, {"rank": 16}),
    "LoKr of a small matrix": (Lokr, {"rank": 2, "factor": 2}),
}


def layer_and_input(kind: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    make, shape = ALL_LAYERS[kind]
    return make(), torch.randn(shape)


def start_of(form: str, layer: Any, name: str = "a", scale: Scale = 1.0, **more: Any) -> FactoredDelta:
    """A new update, as training starts with it."""
    kind, settings = SETTINGS[form]
    return kind.for_layer(layer, name, alpha=ALPHA, scale=scale, **settings, **more)


def made(form: str, layer: Any, name: str = "a", scale: Scale = 1.0, seed: int = 0, **more: Any) -> FactoredDelta:
    """An update of random values."""
    delta = start_of(form, layer, name, scale, **more)
    with_values(delta.parts().values(), seed)
    return delta


def updated(layer: Any, x: Tensor, *deltas: FactoredDelta) -> Tensor:
    """What the layer returns with the weight that the updates make of its own."""
    weight = layer.weight
    for delta in deltas:
        weight = weight + delta.delta_weight(layer.weight)
    output: Tensor = torch.func.functional_call(layer, {"weight": weight}, (x,))
    return output
