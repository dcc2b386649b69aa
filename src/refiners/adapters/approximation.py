"""Low-rank approximations of weight updates: the best ones of their rank, and how much they lose.

The best approximation of rank r in the Frobenius norm keeps the r largest singular values (Eckart and Young 1936); what
it loses is the root of the sum of the squares of the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor

from refiners.adapters.delta import Delta
from refiners.adapters.embedding import EmbeddingLora
from refiners.adapters.low_rank import Lora


@dataclass(frozen=True)
class Limit:
    """How large a low-rank update may be.

    rank: the most, at least 1. energy: the share of the sum of the squares of the singular values that has to be kept,
        above 0 and up to 1; the rank is then the least that keeps it. With both, the smaller rank counts.
    Raises ValueError if neither is given, or one is out of its range.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            raise ValueError("there is no limit for the approximation: give a rank, an energy to keep, or both")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"the rank of an approximation must be at least 1, not {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"the energy to keep is a share above 0 and up to 1, not {self.energy}")


@dataclass(frozen=True)
class Spectrum:
    """A matrix (out, in) as left · diag(values) · right, its singular value decomposition.

    left: (out, n). values: (n,), falling. right: (n, in).
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of_matrix(cls, matrix: Tensor) -> Self:
        """Of a whole matrix (out, in), to within float32, by the eigenvalues of its product with its own transpose.

        In double precision, the squares lose nothing that float32 has, and it takes a third of the time.
        """
        if matrix.shape[0] > matrix.shape[1]:
            turned = cls.of_matrix(matrix.mT)
            return cls(turned.right.mT, turned.values, turned.left.mT)
        rows = matrix.double()
        squares, vectors = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(rows @ rows.mT))
        values, left = squares.flip(0).clamp_min(0).sqrt().float(), vectors.flip(1).float()
        right = left.mT @ matrix.float()
        return cls(left, values, right / values.clamp_min(torch.finfo(values.dtype).tiny)[:, None])

    @classmethod
    def of_product(cls, up: Tensor, down: Tensor) -> Self:
        """Of up (out, R) · down (R, in) in double precision, without the product: by QR of both and SVD of (R, R)."""
        (left, upper), (right, lower) = _qr(up.double()), _qr(down.double().mT)
        inner_left, values, inner_right = _svd(upper @ lower.mT)
        return cls(left @ inner_left, values, inner_right @ right.mT)

    @property
    def norm(self) -> float:
        """The Frobenius norm of the matrix."""
        return self.lost(0)

    def rank_within(self, limit: Limit) -> int:
        """The rank that a limit allows; values that are zero within rounding are not counted, but the least is 1."""
        values = self.values.double()
        floor = values[0] * torch.finfo(self.values.dtype).eps * max(len(self.left), self.right.shape[1])
        rank = int((values > floor).sum())
        if limit.energy is not None:
            kept = values.square().cumsum(0)
            rank = min(rank, int((kept < limit.energy * kept[-1]).sum()) + 1)
        return max(1, rank if limit.rank is None else min(rank, limit.rank))

    def lost(self, rank: int) -> float:
        """The Frobenius norm of what is lost at this rank."""
        return frobenius_norm(self.values[rank:])

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The way down (rank, in) and the way up (out, rank) of the best approximation, both of the same size."""
        roots = self.values[:rank].sqrt()
        return roots[:, None] * self.right[:rank], self.left[:, :rank] * roots


def joined_factors(deltas: Sequence[Delta]) -> tuple[Tensor, Tensor] | None:
    """LoRAs of one layer as one whose rank is the sum of theirs, with their scales in the way up.

    Returns down (R, in) and up (out, R), at least in float32 and with kernels flattened into `in`; of an embedding
    (R, number of vectors) and (their size, R). None if an update is no LoRA, or there are none.
    """
    if not deltas or not all(isinstance(delta, Lora | EmbeddingLora) for delta in deltas):
        return None
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for lora in cast("Sequence[Lora[Any] | EmbeddingLora]", deltas):
        down, up = (lora.down, lora.up) if isinstance(lora, EmbeddingLora) else lora.factors()
        if up.shape[2:].numel() != 1:
            return None
        kind = torch.promote_types(torch.float32, down.dtype)
        downs.append(down.detach().to(kind).flatten(1))
        ups.append(up.detach().to(kind).flatten(1) * lora.factor.to(kind))
    return torch.cat(downs), torch.cat(ups, 1)


def frobenius_norm(tensor: Tensor) -> float:
    """The root of the sum of the squares, worked out in double precision."""
    return cast(Tensor, torch.linalg.vector_norm(tensor, dtype=torch.float64)).item()


def norm_of_product(down: Tensor, up: Tensor) -> float:
    """The Frobenius norm of up (out, R) · down (R, in), in double precision and without the product."""
    return ((up.double().mT @ up.double()) * (down.double() @ down.double().mT)).sum().clamp_min(0).sqrt().item()


@torch.no_grad()
def spectrum_of(deltas: Sequence[Delta], weight: Tensor) -> Spectrum:
    """That of the sum of the updates of a layer's weight, kernels flattened, at their scales of now.

    weight: of the layer, for kinds whose update depends on it; of others only its shape counts.
    """
    factors = joined_factors(deltas)
    if factors is not None:
        down, up = factors
        return Spectrum.of_product(up, down)
    total = torch.zeros_like(weight)
    for delta in deltas:
        total = total + delta.delta_weight(weight)
    return Spectrum.of_matrix(total.flatten(1))


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor, Tensor]", torch.linalg.svd(matrix, full_matrices=False))


def _qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor]", torch.linalg.qr(matrix))
