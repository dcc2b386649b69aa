"""LoRA: adds low-rank updates to a layer, W x + scale * (alpha / rank) * up(down(x)) (arXiv 2106.09685, section 4.1).

Any number of updates on one layer run as one product down and one up.
"""

from typing import Any, cast

import torch
from torch import nn

from refiners.adapters.adapter import Adapter
from refiners.adapters.conv2d_lora import Conv2dLora
from refiners.adapters.delta import Scale
from refiners.adapters.delta_adapter import DeltaAdapter
from refiners.adapters.linear_lora import LinearLora
from refiners.adapters.low_rank import Lora
from refiners.fluxion.layers.module import WeightedModule

__all__ = ["Conv2dLora", "LinearLora", "Lora", "LoraAdapter"]


def lora_class(layer: nn.Module) -> type[Lora[Any]]:
    """The class of LoRAs for a layer: that of linear ones, if it is no convolution."""
    return Conv2dLora if isinstance(layer, nn.Conv2d) else LinearLora


class LoraAdapter(DeltaAdapter):
    """Adds low-rank updates to a linear layer or a convolution.

    target: the layer, or the adapter that sits on it.
    *loras: the updates. If there are none, a new one is made, which starts as zero:
    name, rank, scale, alpha, device, dtype: of the new one; device and dtype are the target's if not given.

    Raises TypeError if the target is no such layer, ValueError if an update does not fit it.

    >>> import refiners.fluxion.layers as fl
    >>> model = fl.Chain(fl.Linear(8, 4))
    >>> adapter = LoraAdapter(model.Linear, rank=2, scale=0.5).inject()
    >>> adapter.scales
    {'lora': 0.5}
    """

    def __init__(
        self,
        target: WeightedModule,
        *loras: Lora[Any],
        rank: int = 16,
        scale: Scale = 1.0,
        alpha: float | None = None,
        name: str = "lora",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layer = target.base if isinstance(target, Adapter) else target
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise TypeError(f"LoraAdapter adapts a Linear or a Conv2d, not a {type(layer).__name__}")
        super().__init__(
            target, *(loras or (lora_class(layer).for_layer(layer, name, rank, scale, alpha, device, dtype),))
        )

    @property
    def loras(self) -> dict[str, Lora[Any]]:
        """The LoRAs of this adapter by name."""
        return {name: delta for name, delta in self.deltas.items() if isinstance(delta, Lora)}

    def add_lora(self, lora: Lora[Any], /) -> None:
        """Add one more LoRA. Raises ValueError if its name is taken or its shape does not fit."""
        self.add_delta(lora)

    def remove_lora(self, name: str, /) -> Lora[Any]:
        """Take a LoRA away and return it. Raises KeyError if there is none of that name."""
        return cast("Lora[Any]", self.remove_delta(name))
