"""Parts of a diffusion model in which a LoRA is stronger or weaker ("block weights")."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import cast

from refiners.weights.lora_keys import XL_UNET, Place

# By the first words of the names of layers, as diffusers ("unet.down_blocks.1", "text_encoder"), the single file
# ("input_blocks.4") or our own trees have them, with or without the part of the pipeline in front; or numbers as web
# UIs write them: 17, or 26 with the blocks that have no attention; of Stable Diffusion XL 12, or 20.
Blocks = Mapping[str, float] | Sequence[float]

# The numbers of the blocks down and up that have attention, and of all, in Stable Diffusion 1 and XL.
_BLOCKS = {
    False: (((1, 2, 4, 5, 7, 8), range(3, 12)), (range(12), range(12))),
    True: (((4, 5, 7, 8), range(6)), (range(9), range(9))),
}


def block_factors(places: Sequence[Place | None], blocks: Blocks | None) -> list[float]:
    """What the scale of a LoRA is multiplied with at each place: that of the longest name that fits, 1 where none does.

    Raises ValueError if a name fits no place, or if there are not as many numbers as blocks.
    """
    if blocks is None:
        return [1.0] * len(places)
    is_xl = any(place is not None and place.component is XL_UNET for place in places)
    by_name = dict(blocks) if isinstance(blocks, Mapping) else _numbered(blocks, is_xl)
    factors, used = [1.0] * len(places), set[str]()
    for name, weight in cast("Mapping[str, object]", by_name).items():
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise ValueError(f"the weight of block {name!r} should be a finite number, not {weight!r:.80}")
    for index, place in enumerate(places):
        fitting = {start for start in _starts(place) if start in by_name} if place else set[str]()
        if fitting:
            factors[index] = by_name[max(fitting, key=len)]
            used |= fitting
    unused = set(by_name) - used
    if unused and isinstance(blocks, Mapping):
        known = {start for place in places if place for start in _starts(place)}
        name = min(unused)
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"no layer of this adapter is in {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    return factors


def _numbered(weights: Sequence[float], is_xl: bool) -> dict[str, float]:
    """The first is of the text encoders, then follow the blocks from the first down to the last up."""
    counts: list[int] = []
    for down, up in _BLOCKS[is_xl]:
        names = [f"input_blocks.{number}" for number in down]
        names += ["middle_block", *(f"output_blocks.{number}" for number in up)]
        counts.append(1 + len(names))
        if counts[-1] == len(weights):
            of_text = {"text_encoder": weights[0], "text_encoder_2": weights[0]}
            return {**of_text, **dict(zip(names, weights[1:], strict=True))}
    raise ValueError(
        f"{len(weights)} block weights, but there are {counts[0]} (BASE, then those with attention, such as IN04, M00 "
        f"and OUT05) or {counts[1]} (all): give as many, or name the blocks"
    )


def _starts(place: Place) -> Iterator[str]:
    """Everything that the names of a place begin with, up to a dot."""
    component = place.component.dotted[0]
    for name in (place.path, *place.names, *(f"{component}{name}" for name in place.names)):
        words = name.split(".")
        for count in range(1, len(words) + 1):
            yield ".".join(words[:count])
