"""Turns of a weight: OFT by blocks (arXiv 2306.07280), BOFT by butterflies of blocks (arXiv 2311.06243).

LyCORIS and kohya turn the outputs of a layer, peft its inputs; `rotation_class` tells their tensors apart.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from refiners.adapters.delta import Scale
from refiners.adapters.rotation import Rotation, cayley
from refiners.weights.lora_keys.kinds import Kind

_USUAL_TERMS = 5  # of peft's series


class Oft(Rotation):
    """OFT as in LyCORIS and kohya's scripts: blocks of outputs turn by Rᵀ, where R is of Q = blocks - blocksᵀ (Cayley).

    blocks: (n, rank, rank). rescale: the scales of outputs, (out, 1, ...), if there are any.
    """

    kind = Kind.OFT
    part_names = ("blocks", "rescale")
    scales_part = "rescale"
    blocks: Tensor
    rescale: Tensor | None

    @classmethod
    def for_layer(
        cls,
        layer: nn.Linear | nn.Conv2d,
        name: str,
        rank: int = 16,
        alpha: float | None = None,
        scale: Scale = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        has_rescale: bool = False,
    ) -> Self:
        """A new update, which turns nothing.

        rank: the most entries of a block, whose number divides the outputs; alpha: the limit, none if not given.
        device, dtype: those of the layer if not given. has_rescale: whether outputs are scaled too.
        Raises ValueError if there are no such blocks.
        """
        weight = layer.weight
        where: dict[str, Any] = {"device": device or weight.device, "dtype": dtype or weight.dtype}
        parts = {"blocks": torch.zeros(cls._shape_of_blocks(weight.shape[0], rank), **where)}
        if has_rescale:
            parts["rescale"] = torch.ones(weight.shape[0], *[1] * (weight.ndim - 1), **where)
        return cls(layer, name, parts, alpha, scale)

    @property
    def rank(self) -> int:
        """The size of the blocks."""
        return self.blocks.shape[-1]

    @classmethod
    def _shape_of_blocks(cls, outputs: int, most: int) -> tuple[int, ...]:
        size = max((size for size in range(2, most + 1) if outputs % size == 0), default=0)
        if not size:
            raise ValueError(f"{outputs} outputs have no blocks of 2 to {most}: give another rank")
        return outputs // size, size, size

    def _turns(self) -> Tensor:
        return cayley(self._limited(-_angles(self.blocks))).unsqueeze(0)

    def _has_blocks_for(self, blocks: Tensor, entries: int) -> bool:
        return blocks.ndim == 3 and blocks.shape[1] == blocks.shape[2] and blocks.shape[:2].numel() == entries


class Boft(Oft):
    """BOFT as in LyCORIS: as `Oft`, but in several stages, by R, and with the entries of a block interleaved.

    blocks: (stages, n, rank, rank).
    At a scale other than 1 the update is scaled, as with every kind here; LyCORIS moves each stage that far from I to
    R.
    """

    kind = Kind.BOFT
    run = 1

    @classmethod
    def _shape_of_blocks(cls, outputs: int, most: int) -> tuple[int, ...]:
        sizes = [size for size in range(2, most + 1, 2) if outputs % size == 0 and (outputs // size).bit_count() == 1]
        if not sizes:
            raise ValueError(f"{outputs} outputs are no power of 2 of even blocks of at most {most}: give another rank")
        size, count = sizes[-1], outputs // sizes[-1]
        return count.bit_length(), count, size, size

    def _turns(self) -> Tensor:
        return cayley(self._limited(_angles(self.blocks)))

    def _has_blocks_for(self, blocks: Tensor, entries: int) -> bool:
        return _is_butterfly(blocks, entries)


class TurnedOft(Rotation):
    """OFT as in old files of LyCORIS, which hold the turns themselves, as they were and scaled: blocks turn by diagᵀ.

    diag: (n, rank, rank).
    """

    kind = Kind.OFT
    part_names = ("diag",)
    diag: Tensor

    @property
    def rank(self) -> int:
        """The size of the blocks."""
        return self.diag.shape[-1]

    def _turns(self) -> Tensor:
        turns = self.diag.to(torch.promote_types(self.dtype, torch.float32)).mT
        return (turns - torch.eye(self.rank, device=turns.device, dtype=turns.dtype)).unsqueeze(0)

    def _has_blocks_for(self, blocks: Tensor, entries: int) -> bool:
        return blocks.ndim == 3 and blocks.shape[1] == blocks.shape[2] and blocks.shape[:2].numel() == entries


class InputOft(Rotation):
    """OFT as in peft: blocks of inputs turn by R of Q, whose entries above the diagonal are given.

    blocks: (n, rank * (rank - 1) / 2), for a convolution of the inputs with their kernels; or (1, ...), for all blocks
        alike.
    terms: of the series I + 2 Q + 2 Q² + ..., the last with 1 in the place of 2, that peft has for R: 5 if not given,
        as peft has them; 0 if its setting `use_cayley_neumann` says no, which turns the other way round, by Rᵀ.

    Peft's own forward pass of a convolution with a kernel is no update of its weight; this is what it merges.
    """

    kind = Kind.OFT
    reads_output = False
    part_names = ("blocks",)
    blocks: Tensor
    terms: Tensor | None

    def __init__(
        self, layer: nn.Module, name: str, parts: Mapping[str, Tensor], alpha: float | None = None, scale: Scale = 1.0
    ) -> None:
        others = {part: tensor for part, tensor in parts.items() if part != "terms"}
        super().__init__(layer, name, others, alpha, scale)
        self.register_buffer("terms", parts.get("terms"))
        self._terms = _USUAL_TERMS if self.terms is None or self.terms.is_meta else int(self.terms)

    def parts(self) -> dict[str, Tensor]:
        """The blocks, and the terms if they were given."""
        return super().parts() | ({} if self.terms is None else {"terms": self.terms})

    @property
    def rank(self) -> int:
        """The size of the blocks."""
        return _size_of_triangle(self.blocks.shape[-1])

    def _turns(self) -> Tensor:
        rows, columns = torch.triu_indices(self.rank, self.rank, 1, device=self.device)
        blocks = self.blocks.to(torch.promote_types(self.dtype, torch.float32))
        upper = blocks.new_zeros(blocks.shape[0], self.rank, self.rank)
        upper = upper.index_put((torch.arange(len(blocks), device=self.device)[:, None], rows, columns), blocks)
        angles = upper - upper.mT
        turns = _series(angles, self._terms) if self._terms else cayley(-angles)
        count = self.shape[1:].numel() // self.rank
        return turns.expand(count, -1, -1).unsqueeze(0)

    def _has_blocks_for(self, blocks: Tensor, entries: int) -> bool:
        size = _size_of_triangle(blocks.shape[-1]) if blocks.ndim == 2 else 0
        is_triangle = size > 1 and size * (size - 1) // 2 == blocks.shape[-1]
        return is_triangle and entries % size == 0 and blocks.shape[0] in (1, entries // size)


class InputBoft(Rotation):
    """BOFT as in peft: blocks of inputs turn by Rᵀ, where R is of Q = (R - Rᵀ) / 2 for the tensor R (Cayley).

    R: (stages, n, rank, rank), for a convolution of the inputs with their kernels. s: (out, 1) or (1, out).
    """

    kind = Kind.BOFT
    reads_output = False
    part_names = ("R", "s")
    scales_part = "s"
    R: Tensor
    s: Tensor | None

    @property
    def rank(self) -> int:
        """The size of the blocks."""
        return self.R.shape[-1]

    @property
    def run(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]  # it follows from the blocks
        """Half a block; blocks of one stage need not be even."""
        return self.rank // 2 if self.R.shape[0] > 1 else None

    def _turns(self) -> Tensor:
        return cayley(_angles(self.R) / -2)

    def _has_blocks_for(self, blocks: Tensor, entries: int) -> bool:
        return _is_butterfly(blocks, entries)


def rotation_class(name: str, parts: Mapping[str, Tensor]) -> type[Rotation]:
    """Which class makes the update `name` of these parts. Raises ValueError if none does."""
    if "R" in parts:
        return InputBoft
    if "diag" in parts:
        return TurnedOft
    classes: dict[int, type[Rotation]] = {2: InputOft, 3: Oft, 4: Boft}
    blocks = parts.get("blocks")
    if blocks is None or blocks.ndim not in classes:
        found = "none" if blocks is None else f"of shape {tuple(blocks.shape)}"
        raise ValueError(f"OFT {name!r} should have blocks of 2 (peft), 3 or 4 (LyCORIS) dimensions, but has {found}")
    return classes[blocks.ndim]


def _angles(blocks: Tensor) -> Tensor:
    blocks = blocks.to(torch.promote_types(blocks.dtype, torch.float32))
    return blocks - blocks.mT


def _series(angles: Tensor, terms: int) -> Tensor:
    """The first terms of the series of R = (I + Q) (I - Q)⁻¹, less the first of all, I."""
    last = max(terms - 1, 3) if terms > 2 else 1  # peft counts 3 terms as 4
    total, power = 2 * angles, angles
    for exponent in range(2, last + 1):
        power = power @ angles
        total = total + power * (1 if exponent == last else 2)
    return total


def _size_of_triangle(count: int) -> int:
    """How many rows a square matrix has with so many entries above the diagonal, or fewer."""
    return (1 + int((1 + 8 * count) ** 0.5)) // 2


def _is_butterfly(blocks: Tensor, entries: int) -> bool:
    if blocks.ndim != 4 or blocks.shape[2] != blocks.shape[3] or blocks.shape[1:3].numel() != entries:
        return False
    stages, count, size, _ = blocks.shape
    return stages == 1 or (stages > 1 and size % 2 == 0 and count % 2 ** (stages - 1) == 0)
