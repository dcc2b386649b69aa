"""What was lost when weight updates were written in another form, as a value: per layer and in total."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from refiners.weights.lora_keys import Kind


@dataclass(frozen=True)
class LayerLoss:
    """One update of a layer: as it was written, or as it could not be.

    path: of the layer, from the model on.
    rank: None for kinds without.
    norm: the Frobenius norm of the update that was wanted, at strength 1. lost: that of its difference to the written.
    """

    path: str
    kind: Kind
    rank: int | None
    norm: float
    lost: float = 0.0

    @property
    def error(self) -> float:
        """What was lost, relative to what was wanted; 0 is nothing, 1 is all."""
        return self.lost / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class LoraLosses:
    """What a file of updates holds, and what it has lost; its text is a summary."""

    target: Path
    layers: tuple[LayerLoss, ...]

    @property
    def error(self) -> float:
        """What was lost of all layers together, relative to what was wanted, in the Frobenius norm."""
        wanted = math.hypot(*(layer.norm for layer in self.layers))
        return math.hypot(*(layer.lost for layer in self.layers)) / wanted if wanted else 0.0

    @property
    def worst(self) -> LayerLoss:
        """The layer with the greatest error. Raises ValueError if there are no layers."""
        return max(self.layers, key=lambda layer: layer.error)

    def __str__(self) -> str:
        kinds = Counter(layer.kind for layer in self.layers)
        parts = [f"{kind} on {count} layers" for kind, count in kinds.items()]
        ranks = sorted({layer.rank for layer in self.layers if layer.rank is not None})
        if ranks:
            parts.append(f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}")
        if not any(layer.lost for layer in self.layers):
            parts.append("nothing was lost")
        else:
            worst = self.worst
            parts.append(f"lost {_percent(self.error)} in all, the most at {worst.path}: {_percent(worst.error)}")
        return f"{self.target}: {'; '.join(parts)}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
