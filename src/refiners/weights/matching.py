"""From the names of a file to ours: every tensor finds its place, or one error says which do not and why.

Nothing here knows a model: places are names and shapes.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from refiners.weights.rules import Names, UnknownNameError

Shapes = Mapping[str, Sequence[int]]


@dataclass
class Misfits:
    """What keeps a file from fitting, by the file's names."""

    unknown: list[str] = field(default_factory=list[str])
    missing: list[str] = field(default_factory=list[str])
    misshapen: list[str] = field(default_factory=list[str])
    not_finite: list[str] = field(default_factory=list[str])

    def __str__(self) -> str:
        """All of it in one sentence, "" if everything fits."""
        parts: list[str] = []
        if self.unknown:
            first = self.unknown[0]
            parts.append(f"{len(self.unknown)} tensors have no place (first: {first!r}{nearest(first, self.missing)})")
        if self.missing:
            parts.append(f"{len(self.missing)} are missing (first: {self.missing[0]!r})")
        if self.misshapen:
            parts.append(f"{len(self.misshapen)} have another shape (first: {self.misshapen[0]})")
        if self.not_finite:
            parts.append(f"{len(self.not_finite)} hold NaN or infinite values (first: {self.not_finite[0]!r})")
        return ", ".join(parts)


def match(tensors: Mapping[str, Tensor], names: Names, shapes: Shapes) -> tuple[dict[str, Tensor], Misfits]:
    """Bring the tensors of a file under our names; also tell what does not fit.

    names: between ours and the file's.  shapes: of all our tensors, by our names.
    A tensor that only has dimensions of size 1 too many or too few at its end is viewed in the right shape: the same
    map is a linear layer in one format and a convolution of size 1 in another.
    """
    matched: dict[str, Tensor] = {}
    misfits = Misfits()
    places = set[str]()
    for theirs, tensor in tensors.items():
        try:
            ours = names.to_ours(theirs)
        except UnknownNameError:
            misfits.unknown.append(theirs)
            continue
        if ours is None:
            continue
        if ours not in shapes or ours in places:
            misfits.unknown.append(theirs)
            continue
        places.add(ours)
        fitted = reshaped(tensor, shapes[ours])
        if fitted is None:
            misfits.misshapen.append(f"{theirs!r} is {tuple(tensor.shape)} and should be {tuple(shapes[ours])}")
        elif not is_finite(fitted):
            misfits.not_finite.append(theirs)
        else:
            matched[ours] = fitted
    misfits.missing = [str(names.to_theirs(ours)) for ours in shapes if ours not in places]
    return matched, misfits


def match_all(tensors: Mapping[str, Tensor], names: Names, shapes: Shapes, where: str) -> dict[str, Tensor]:
    """As `match`. Raises ValueError, which starts with `where`, if anything does not fit."""
    matched, misfits = match(tensors, names, shapes)
    if problem := str(misfits):
        raise ValueError(f"{where}: {problem}")
    return matched


def reshaped(tensor: Tensor, shape: Sequence[int]) -> Tensor | None:
    """The tensor in that shape if they differ by dimensions of size 1 at the end at most, or else None."""
    longer, shorter = sorted((tuple(tensor.shape), tuple(shape)), key=len, reverse=True)
    if longer != shorter + (1,) * (len(longer) - len(shorter)) or (len(shorter) < 2 and longer != shorter):
        return None
    return tensor.reshape(tuple(shape))


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass over the memory and without a copy of the tensor."""
    if not tensor.is_floating_point() or tensor.device.type == "meta":
        return True
    if tensor.dtype.itemsize == 1:  # float8 has no sums
        return bool(tensor.float().isfinite().all())
    # a sum is finite only if all terms are, but for overflow: then the terms themselves tell
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def nearest(name: str, known: Iterable[str]) -> str:
    """`, the nearest is 'x'`, or "" if nothing is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f", the nearest is {found[0]!r}" if found else ""
