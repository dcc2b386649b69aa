"""`Rotation`: what updates have in common that turn a weight by orthogonal matrices (OFT, BOFT)."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn

from refiners.adapters.delta import RankedDelta, Scale
from refiners.adapters.layer_calls import over_channels
from refiners.adapters.parts_delta import PartsDelta


class Rotation(RankedDelta, PartsDelta):
    """f(W) = s T(W): T turns the columns of W, vectors of outputs, or its rows, of inputs; s scales each output.

    The vectors are turned in stages, in each of which blocks of `rank` entries turn. With several stages (a butterfly)
    a block is of entries of two runs, which lie twice as far apart in each stage as in the one before.

    alpha: no strength but a limit, if it is more than 0: that of the norm of all angles is alpha times the outputs.

    Raises ValueError, with the reason, if the parts do not fit the layer.
    """

    reads_output = True  # whether the outputs are turned
    scales_part: ClassVar[str | None] = None  # the name of s
    # How many entries of a run stay side by side in a block of a butterfly; None if there is one stage, of whole runs.
    run: int | None = None

    def __init__(
        self, layer: nn.Module, name: str, parts: Mapping[str, Tensor], alpha: float | None = None, scale: Scale = 1.0
    ) -> None:
        super().__init__(name, scale, alpha or 0.0)
        self._take_parts(layer, parts)
        self._make_numbers()

    @classmethod
    def from_parts(
        cls, layer: nn.Module, name: str, parts: Mapping[str, Tensor], alpha: float | None = None, scale: Scale = 1.0
    ) -> Self:
        """As the constructor."""
        return cls(layer, name, parts, alpha, scale)

    @property
    def gain(self) -> float:
        """1: what is turned has no strength but the scale."""
        return 1.0

    @property
    def runs_as_weight(self) -> bool:
        """Whether inputs are turned; outputs are turned as they come."""
        return not self.reads_output

    @abstractmethod
    def _turns(self) -> Tensor:
        """The turns of all blocks less the identity: (stages, blocks, rank, rank), at least in float32."""

    def direction(self, weight: Tensor) -> Tensor:
        """f(W) - W, at least in float32, as the two are near each other."""
        turns = self._turns()
        rows = weight.flatten(1).to(turns.dtype)
        moved = self._moved(turns, rows) if self.reads_output else self._moved(turns, rows.mT).mT
        return self._scaled_outputs(rows, moved).view(weight.shape)

    def forward(self, x: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
        """As in `Delta`; outputs are turned without another call of the layer."""
        if not self.reads_output or getattr(layer, "groups", 1) != 1:  # a block may turn outputs of several groups
            return super().forward(x, output, layer)
        turns, bias = self._turns(), cast("Tensor | None", layer.bias)
        vectors = (output if bias is None else output - over_channels(layer, bias)).to(turns.dtype)
        is_linear = isinstance(layer, nn.Linear)
        columns = vectors.view(-1, vectors.shape[-1]).mT if is_linear else vectors.flatten(-2)
        update = self._scaled_outputs(columns, self._moved(turns, columns))
        return self.scaled((update.mT if is_linear else update).reshape(output.shape)).to(output.dtype)

    def _moved(self, turns: Tensor, columns: Tensor) -> Tensor:
        """What the turns change of vectors of entries (..., entries, vectors)."""
        first, *others = turns.unbind()
        moved = self._turned(first, columns, 1)
        for stage, blocks in enumerate(others, start=1):
            moved = moved + self._turned(blocks, columns + moved, 2**stage)
        return moved

    def _turned(self, blocks: Tensor, columns: Tensor, distance: int) -> Tensor:
        """Multiply blocks of entries, from runs `distance` half blocks apart, by matrices (blocks, rank, rank)."""
        if self.run is None:
            return (blocks @ _split(columns, *blocks.shape[:2])).flatten(-3, -2)
        count = distance * self.rank // (2 * self.run)
        spans = columns.shape[-2] // (2 * count * self.run)
        mixed = _split(columns, spans, 2, count, self.run).transpose(-4, -3).flatten(-5, -2)
        turned = (blocks @ _split(mixed, *blocks.shape[:2])).flatten(-3, -2)
        return _split(turned, spans, count, 2, self.run).transpose(-4, -3).flatten(-5, -2)

    def _scaled_outputs(self, columns: Tensor, moved: Tensor) -> Tensor:
        """The change with the scales of outputs, (..., out, vectors), where the turns change `columns` by `moved`."""
        scales = None if self.scales_part is None else cast("Tensor | None", getattr(self, self.scales_part))
        if scales is None:
            return moved
        scales = scales.view(-1, 1).to(columns.dtype)
        return (scales - 1) * columns + scales * moved

    def _limited(self, angles: Tensor) -> Tensor:
        """The angles made smaller, all by the same factor, if their norm is above the limit."""
        if not self._alpha:
            return angles
        norm = cast(Tensor, torch.linalg.vector_norm(angles))
        return angles * (self._alpha * self.shape[0] / (norm + 1e-8)).clamp(max=1)

    def _problem(self) -> str | None:
        part = self.part_names[0]
        blocks = cast("Tensor | None", getattr(self, part))
        if blocks is None:
            return f"its {part} is missing"
        entries = self.shape[0] if self.reads_output else self.shape[1:].numel()
        if not self._has_blocks_for(blocks, entries):
            side = "outputs" if self.reads_output else "inputs of each output"
            return f"its {part} has shape {tuple(blocks.shape)}, which makes no blocks of the layer's {entries} {side}"
        scales = None if self.scales_part is None else cast("Tensor | None", getattr(self, self.scales_part))
        if scales is not None and (scales.numel() != self.shape[0] or scales.ndim > len(self.shape)):
            return f"its {self.scales_part} has shape {tuple(scales.shape)}, for {self.shape[0]} outputs of the layer"
        return None

    @abstractmethod
    def _has_blocks_for(self, blocks: Tensor, entries: int) -> bool:
        """Whether the first part is of a shape that turns vectors of so many entries."""


def cayley(angles: Tensor) -> Tensor:
    """R - I for R = (I + Q) (I - Q)⁻¹, which is orthogonal, of skew-symmetric Q (..., n, n); zero where Q is."""
    identity = torch.eye(angles.shape[-1], device=angles.device, dtype=angles.dtype)
    return cast(Tensor, torch.linalg.solve(identity - angles, 2 * angles))


def _split(columns: Tensor, *sizes: int) -> Tensor:
    """Split the entries (..., entries, vectors) into a dimension for each of the sizes."""
    return columns.reshape(*columns.shape[:-2], *sizes, columns.shape[-1])
