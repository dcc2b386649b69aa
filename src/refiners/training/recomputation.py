"""Gradient checkpointing of a tree that is there already, as adapters that can be ejected."""

from typing import Any

from torch import nn

import refiners.fluxion.layers as fl
from refiners.adapters.adapter import Adapter
from refiners.fluxion.layers.recomputed import Recomputed


class RecomputedBlock(Recomputed, Adapter[fl.Chain]):
    """Has a block drop its activations after a forward pass, and compute them again for the backward pass."""

    def __init__(self, target: fl.Chain) -> None:
        with self.setup_adapter(target):
            super().__init__(target)


def recompute(tree: nn.Module, blocks: tuple[type[fl.Chain], ...]) -> list[RecomputedBlock]:
    """Inject a `RecomputedBlock` on each block of some classes below `tree`, outermost ones first, and return them.

    Raises ValueError if there is none.
    """
    found: list[tuple[Any, Any]] = list(tree.walk(blocks)) if isinstance(tree, fl.Chain) else []
    if not found:
        names = ", ".join(block.__name__ for block in blocks)
        raise ValueError(f"there is no {names} in this {type(tree).__name__} whose activations could be recomputed")
    with fl.transaction():
        return [RecomputedBlock(block).inject(parent) for block, parent in found]
