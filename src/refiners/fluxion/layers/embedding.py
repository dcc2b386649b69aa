"""Look-up of learned vectors."""

import torch
from torch import nn

from refiners.fluxion.layers.module import WeightedModule, single_output


@single_output
class Embedding(nn.Embedding, WeightedModule):
    """Integer ids (...) in 0 … num_embeddings - 1 to vectors (..., embedding_dim)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """As in torch; on the meta device nothing is done, for which torch would import its compiler."""
        if not self.weight.is_meta:
            super().reset_parameters()
