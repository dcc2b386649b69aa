"""Edits of a UNet that are made of many adapters, and go in and out as one."""

from collections.abc import Iterable
from typing import Any, Self

from torch import nn

import refiners.fluxion.layers as fl
from refiners.adapters.adapter import Adapter


class Steering:
    """Adapters that are injected and ejected together, all or none; any number of such edits stack on one UNet.

    adapters: each with a chain that its target is in, at whatever depth.
    """

    def __init__(self, adapters: Iterable[tuple[Adapter[Any], fl.Chain]]) -> None:
        self._adapters = tuple(adapters)

    def inject(self) -> Self:
        """Put the edit on the UNet and return it. Raises RuntimeError if it is there already."""
        with fl.transaction():
            for adapter, place in self._adapters:
                adapter.inject(place)
        return self

    def eject(self) -> None:
        """Take the edit off: the UNet is as it was without it, bit by bit. Raises RuntimeError if it is not there."""
        with fl.transaction():
            for adapter, _ in reversed(self._adapters):
                adapter.eject()


class Preceded(fl.Chain, Adapter[nn.Module]):
    """A layer, and then the target."""

    def __init__(self, layer: nn.Module, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(layer, target)


class Followed(fl.Chain, Adapter[nn.Module]):
    """The target, and then a layer."""

    def __init__(self, target: nn.Module, layer: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(target, layer)
