"""Chooses the layers of a tree that are to be adapted, by class names or by paths."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

import refiners.fluxion.layers as fl
from refiners.training.settings import nearest


def find_targets(
    tree: fl.Chain, patterns: Sequence[str], layers: tuple[type[nn.Module], ...] = (nn.Linear,)
) -> list[tuple[Any, fl.Chain]]:
    """The layers of some classes that a pattern fits, each with its parent, in the order of the tree.

    patterns: the class of a layer or of anything it sits in ("Attention", "UpBlocks"), or a path in which `*` stands
        for anything ("DownBlocks.*.SelfAttention.*").
    Raises ValueError for a pattern that fits no layer, with the nearest one that would.
    """
    candidates = [(layer, parent, *_place(layer, parent, tree)) for layer, parent in tree.walk(layers)]
    known = {name for _, _, _, classes in candidates for name in classes}
    for pattern in patterns:
        if not any(_fits(pattern, path, classes) for _, _, path, classes in candidates):
            kinds = " or ".join(layer.__name__ for layer in layers)
            raise ValueError(f"{pattern!r} fits no {kinds} of this {type(tree).__name__}; {nearest(pattern, known)}")
    return [
        (layer, parent)
        for layer, parent, path, classes in candidates
        if any(_fits(pattern, path, classes) for pattern in patterns)
    ]


def _place(layer: nn.Module, parent: fl.Chain, tree: fl.Chain) -> tuple[str, list[str]]:
    """The path of a layer below `tree`, and the classes of all it sits in and of itself."""
    above: Iterable[fl.Chain] = [parent, *parent.get_parents()]
    names, classes, node = list[str](), [type(layer).__name__], layer
    for chain in above:
        names.append(chain.slot_of(node))
        classes.append(type(chain).__name__)
        if chain is tree:
            break
        node = chain
    return ".".join(reversed(names)), classes


def _fits(pattern: str, path: str, classes: Sequence[str]) -> bool:
    return pattern in classes or (any(mark in pattern for mark in ".*?") and fnmatchcase(path, pattern))
