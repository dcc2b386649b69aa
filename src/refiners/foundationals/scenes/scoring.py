"""How well pictures obey captions, as the reader sees it.

Things and their places are judged apart: a thing in the wrong place is still the right thing.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from refiners.foundationals.scenes.captions import Request, holds, parse_caption
from refiners.foundationals.scenes.reader import read_scenes
from refiners.foundationals.scenes.scene import Scene, Thing

T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """Whether one picture obeys its caption; None where the caption asks for nothing of the kind.

    things: it has exactly the things asked for, somewhere.
    present: it has at least those.
    shapes, colors: its things have exactly the shapes, or the colours, asked for.
    places: every thing that has a place or a relation in the caption is there, and lies so.
    background: it is the one asked for.
    """

    things: bool
    present: bool
    shapes: bool
    colors: bool
    places: bool | None
    background: bool | None


@dataclass(frozen=True)
class Scores:
    """Shares, 0 … 1, of the pictures that obey, out of those whose captions ask; nan where none asks. See `Score`."""

    things: float
    present: float
    shapes: float
    colors: float
    places: float
    background: float
    count: int

    def __str__(self) -> str:
        shares = [(each.name, getattr(self, each.name)) for each in fields(Score)]
        return ", ".join(f"{name} {share:.1%}" for name, share in shares) + f" ({self.count} pictures)"


def score(images: Sequence[Image.Image] | Float[Tensor, "b 3 32 32"], captions: Sequence[str]) -> Scores:
    """How well each picture obeys its caption, on average; tensors are in [-1, 1].

    Raises ValueError if pictures and captions are not equally many, there are none, the pictures do not have 32 x 32
    pixels, or a caption names no thing.
    """
    pairs = _pairs(read_scenes(images), captions, "captions")
    return average([score_scene(scene, request_of(text)) for scene, text in pairs])


@dataclass(frozen=True)
class LayoutScores:
    """Shares, 0 … 1, of the pictures that are laid out as they should be.

    places: there is something wherever there should be, and nothing elsewhere.
    shapes, colors: and all of it is of the right shape, or of the right colour.
    things: and of both.
    """

    places: float
    shapes: float
    colors: float
    things: float


def score_layout(images: Sequence[Image.Image] | Float[Tensor, "b 3 32 32"], scenes: Sequence[Scene]) -> LayoutScores:
    """How often each picture has the things of its scene in the very places of it, and no others.

    Raises ValueError if pictures and scenes are not equally many, or there are none.
    """
    pairs = _pairs(read_scenes(images), scenes, "scenes")
    kinds: list[Callable[[Thing], object]] = [
        lambda thing: True,
        lambda thing: thing.shape,
        lambda thing: thing.color,
        lambda thing: thing,
    ]
    shares = [sum(_laid_out(a, kind) == _laid_out(b, kind) for a, b in pairs) / len(pairs) for kind in kinds]
    return LayoutScores(*shares)


def score_carried(images: Sequence[Image.Image] | Float[Tensor, "b 3 32 32"], things: Sequence[Thing]) -> float:
    """The share of the pictures that have the thing that they should have, somewhere. Raises as `score_layout`."""
    pairs = _pairs(read_scenes(images), things, "things")
    return sum(thing in scene.things for scene, thing in pairs) / len(pairs)


def request_of(caption: str) -> Request:
    """What a caption asks for. Raises ValueError if it names no thing."""
    request = parse_caption(caption)
    if not request.things:
        raise ValueError(f"the caption {caption!r} names no coloured shape, such as 'a red circle', to look for")
    return request


def score_scene(scene: Scene, request: Request) -> Score:
    """Whether a scene is what was asked for."""
    found, asked = scene.things, request.things
    return Score(
        things=Counter(found) == Counter(asked),
        present=Counter(asked) <= Counter(found),
        shapes=Counter(thing.shape for thing in found) == Counter(thing.shape for thing in asked),
        colors=Counter(thing.color for thing in found) == Counter(thing.color for thing in asked),
        places=_is_placed(scene, request) if request.asks_for_places else None,
        background=None if request.background is None else scene.background == request.background,
    )


def average(scores: Sequence[Score]) -> Scores:
    """The shares over many pictures."""
    shares: dict[str, float] = {}
    for each in fields(Score):
        values = [getattr(one, each.name) for one in scores]
        asked = [value for value in values if value is not None]
        shares[each.name] = sum(asked) / len(asked) if asked else float("nan")
    return Scores(**shares, count=len(scores))


def _is_placed(scene: Scene, request: Request) -> bool:
    where = [_places_of(thing, scene) for thing in request.things]
    in_parts = [
        bool(part & places) for part, places in zip(request.parts, where, strict=True) if len(part) < len(scene.places)
    ]
    related = [
        any(holds(relation.kind, first, second) for first in where[relation.first] for second in where[relation.second])
        for relation in request.relations
    ]
    return all(in_parts) and all(related)


def _pairs(scenes: Sequence[Scene], wanted: Sequence[T], what: str) -> list[tuple[Scene, T]]:
    if len(scenes) != len(wanted) or not scenes:
        raise ValueError(f"{len(scenes)} pictures and {len(wanted)} {what}: give as many of both, at least one")
    return list(zip(scenes, wanted, strict=True))


def _laid_out(scene: Scene, kind: Callable[[Thing], object]) -> list[object]:
    return [thing and kind(thing) for thing in scene.places]


def _places_of(thing: Thing, scene: Scene) -> set[int]:
    return {place for place, found in enumerate(scene.places) if found == thing}
