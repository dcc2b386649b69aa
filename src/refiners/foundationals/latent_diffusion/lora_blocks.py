"""Parts of a diffusion model in which a LoRA is stronger or weaker ("block weights")."""

import difflib
from collections.abc import Iterator, Mapping, Sequence

from refiners.weights.lora_keys import Place

# By the first words of the names of layers, as diffusers ("unet.down_blocks.1", "text_encoder"), the single file
# ("input_blocks.4") or our own trees have them, with or without the part of the pipeline in front; or numbers as web
# UIs write them: 17, or 26 with the blocks that have no attention.
Blocks = Mapping[str, float] | Sequence[float]

_WITH_ATTENTION = {"input_blocks": (1, 2, 4, 5, 7, 8), "output_blocks": tuple(range(3, 12))}
_ALL = {"input_blocks": tuple(range(12)), "output_blocks": tuple(range(12))}


def block_factors(places: Sequence[Place | None], blocks: Blocks | None) -> list[float]:
    """What the scale of a LoRA is multiplied with at each place: that of the longest name that fits, 1 where none does.

    Raises ValueError if a name fits no place, or if numbers are not 17 or 26.
    """
    if blocks is None:
        return [1.0] * len(places)
    by_name = dict(blocks) if isinstance(blocks, Mapping) else _numbered(blocks)
    factors, used = [1.0] * len(places), set[str]()
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
        raise ValueError(f"no layer of this LoRA is in {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    return factors


def _numbered(weights: Sequence[float]) -> dict[str, float]:
    for blocks in (_WITH_ATTENTION, _ALL):
        names = ["text_encoder", *(f"input_blocks.{number}" for number in blocks["input_blocks"]), "middle_block"]
        names += [f"output_blocks.{number}" for number in blocks["output_blocks"]]
        if len(names) == len(weights):
            return dict(zip(names, weights, strict=True))
    raise ValueError(
        f"{len(weights)} block weights, but there are 17 (BASE, IN01, IN02, IN04, IN05, IN07, IN08, M00, OUT03 to "
        "OUT11) or 26 (all): give as many, or name the blocks"
    )


def _starts(place: Place) -> Iterator[str]:
    """Everything that the names of a place begin with, up to a dot."""
    component = place.component.dotted[0]
    for name in (place.path, *place.names, *(f"{component}{name}" for name in place.names)):
        words = name.split(".")
        for count in range(1, len(words) + 1):
            yield ".".join(words[:count])
