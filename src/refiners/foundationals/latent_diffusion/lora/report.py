"""What a LoRA file did to a model, as a value: what attached, with which strength, and what was left out, and why."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from refiners.weights.lora_keys import Kind, LeftOut, LoraUpdate


@dataclass(frozen=True)
class AttachedUpdate:
    """One layer with an update on it.

    path: of the layer, from the model on.
    key: what the file calls the layer.
    rank, alpha: of kinds that have them.
    strength: the alpha over the rank; 1 for kinds without.
    dtype: that of the tensors in the model.
    """

    path: str
    key: str
    kind: Kind
    rank: int | None
    alpha: float | None
    strength: float
    dtype: torch.dtype


@dataclass(frozen=True)
class LoraReport:
    """What `LoraWeights.patch` did; its text is a summary.

    source: the file. name: of its updates in the model.
    """

    source: str
    name: str
    attached: tuple[AttachedUpdate, ...]
    left_out: tuple[LeftOut, ...]

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.source} as {self.name!r}: {summary(self.attached)}",
                *(f"  left out {item}" for item in self.left_out),
            ]
        )


def attached_update(update: LoraUpdate, dtype: torch.dtype) -> AttachedUpdate:
    """What the report says of an update that is in the model with this dtype."""
    return AttachedUpdate(
        update.place.path, update.name, update.shown_kind, update.rank, update.alpha, update.strength, dtype
    )


def summary(attached: Sequence[AttachedUpdate]) -> str:
    """How many layers of which component, of which kinds, ranks and strengths.

    >>> lora = AttachedUpdate("unet.Linear", "unet.proj_in", Kind.LORA, 4, 2.0, 0.5, torch.float32)
    >>> summary([lora])
    '1 layer of unet; LoRA of rank 4, strength 0.5'
    """
    components = Counter(update.path.partition(".")[0] for update in attached)
    layers = ", ".join(f"{count} layer{'s' * (count > 1)} of {name}" for name, count in components.items())
    kinds = "/".join(sorted({str(update.kind) for update in attached}))
    ranks = [update.rank for update in attached if update.rank is not None]
    of_rank = f" of rank {_range(ranks)}" if ranks else ""
    strengths = _range([update.strength for update in attached])
    return f"{layers}; {kinds}{of_rank}, strength {strengths}" if attached else "nothing attached"


def _range(values: Sequence[float]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
