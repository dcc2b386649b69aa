"""LoRA of an embedding: low-rank updates of a table of vectors."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refiners.adapters.delta import RankedDelta, Scale
from refiners.weights.lora_keys.kinds import Kind


class EmbeddingLora(RankedDelta):
    """Adds scale * alpha / rank * (up · down)^T to the table of an embedding, as peft does.

    down: (rank, number of vectors).  up: (their size, rank).
    """

    kind = Kind.EMBEDDING

    def __init__(self, name: str, /, down: Tensor, up: Tensor, scale: Scale = 1.0, alpha: float | None = None) -> None:
        super().__init__(name, scale, alpha)
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise ValueError(f"LoRA {name!r}: down {tuple(down.shape)} and up {tuple(up.shape)} do not share a rank")
        self.down = nn.Parameter(down.detach())
        self.up = nn.Parameter(up.detach())
        self._make_numbers()

    @classmethod
    def from_parts(
        cls, layer: nn.Module, name: str, parts: Mapping[str, Tensor], alpha: float | None = None, scale: Scale = 1.0
    ) -> Self:
        """A LoRA of "down" (rank, number of vectors) and "up" (their size, rank)."""
        return cls(name, parts["down"], parts["up"], scale, alpha).checked_for(layer)

    @classmethod
    def for_layer(
        cls,
        layer: nn.Embedding,
        name: str,
        rank: int = 16,
        alpha: float | None = None,
        scale: Scale = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A new update, which starts as zero: `down` is zero, `up` is random."""
        device, dtype = device or layer.weight.device, dtype or layer.weight.dtype
        down = torch.zeros(rank, layer.num_embeddings, device=device, dtype=dtype)
        up = torch.randn(layer.embedding_dim, rank, device=device, dtype=dtype)
        return cls(name, down, up, scale, alpha)

    def parts(self) -> dict[str, Tensor]:
        """As `from_parts` takes them: "down" and "up"."""
        return {"down": self.down, "up": self.up}

    @property
    def rank(self) -> int:
        """How many dimensions the update goes through."""
        return self.down.shape[0]

    @property
    def runs_as_weight(self) -> bool:
        """A look-up in `down` and a small product take less than the whole table."""
        return False

    def misfit(self, layer: nn.Module) -> str | None:
        """Why this update cannot be added to `layer`, or None if it can."""
        if not isinstance(layer, nn.Embedding):
            return f"it updates an embedding, not a {type(layer).__name__}"
        ours, theirs = (self.down.shape[1], self.up.shape[0]), (layer.num_embeddings, layer.embedding_dim)
        if ours == theirs:
            return None
        return f"it updates {ours[0]} vectors of size {ours[1]}, the layer has {theirs[0]} of size {theirs[1]}"

    def direction(self, weight: Tensor) -> Tensor:
        """The transpose of up · down."""
        return (self.up @ self.down).t()

    def forward(self, x: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
        """The update of the vectors of ids x (...)."""
        return self.scaled(F.embedding(x, self.down.t()) @ self.up.t()).to(output.dtype)
