"""Captions of scenes, and what a caption asks for.

"a red circle above a blue square", "a green star in the top left on a white background".
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from refiners.foundationals.scenes.scene import BACKGROUNDS, COLORS, FILLS, MAX_THINGS, PLACES, SHAPES, Scene, Thing

# Which places a word for a part of the picture stands for: indices into PLACES.
PARTS: dict[str, frozenset[int]] = {
    "top left": frozenset({0}),
    "top right": frozenset({1}),
    "bottom left": frozenset({2}),
    "bottom right": frozenset({3}),
    "top": frozenset({0, 1}),
    "bottom": frozenset({2, 3}),
    "left": frozenset({0, 2}),
    "right": frozenset({1, 3}),
}
# Whether the first of two places lies so to the second.
RELATIONS = ("above", "below", "left of", "right of")
SYNONYMS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}
ANYWHERE = frozenset(range(len(PLACES)))

_ANY_RELATION = "|".join(re.escape(word) for words in SYNONYMS.values() for word in words)
_THING = re.compile(
    rf"(?:\b(?P<fill>{'|'.join(FILLS[1:])}) )?\b(?P<color>{'|'.join(COLORS)}) (?P<shape>{'|'.join(SHAPES)})\b"
)
_RELATION = re.compile(rf"\b({_ANY_RELATION})\b")
_PART = re.compile(r"\b(?:in|at|on) the ((?:top|bottom) (?:left|right)|top|bottom|left|right)\b")
_BACKGROUND = re.compile(rf"\bon (?:a )?({'|'.join(BACKGROUNDS)})\b")


@dataclass(frozen=True)
class Relation:
    """How the thing number `first` of a caption lies to the thing number `second`; `kind` is one of RELATIONS."""

    first: int
    kind: str
    second: int


@dataclass(frozen=True)
class Request:
    """What a caption asks for.

    things: in the order of the caption.  parts: the places in which each of them may be.
    background: None for any.
    """

    things: tuple[Thing, ...]
    parts: tuple[frozenset[int], ...]
    relations: tuple[Relation, ...]
    background: str | None

    @property
    def asks_for_places(self) -> bool:
        """Whether the caption says of anything where it should be."""
        return bool(self.relations) or any(part != ANYWHERE for part in self.parts)


def holds(kind: str, first: int, second: int) -> bool:
    """Whether place `first` lies above, below, left of or right of place `second`; diagonals count for both."""
    rows, columns = (first // 2, second // 2), (first % 2, second % 2)
    if kind == "above":
        return rows[0] < rows[1]
    if kind == "below":
        return rows[0] > rows[1]
    if kind == "left of":
        return columns[0] < columns[1]
    return columns[0] > columns[1]


def caption_of(scene: Scene, chance: Random) -> str:
    """One of the captions of a scene, by lot: most say where things are, half name the background."""
    placed = [(place, thing) for place, thing in enumerate(scene.places) if thing is not None]
    chance.shuffle(placed)
    places, things = [place for place, _ in placed], [with_article(thing) for _, thing in placed]
    if len(things) == 2 and chance.random() < 0.5:
        text = f"{things[0]} {_relation(places[0], places[1], chance)} {things[1]}"
    elif chance.random() < 0.75:
        corner = " corner" if len(things) < MAX_THINGS else ""  # else the caption may become too long for the encoder
        parts = [_part(place, corner, chance) for place in places]
        text = _listed([f"{thing} {part}" for thing, part in zip(things, parts, strict=True)])
    else:
        text = _listed(things)
    return text + _background(scene, chance)


def caption_without_places(scene: Scene, chance: Random) -> str:
    """One of the captions that name the things of a scene and leave open where they are."""
    things = [with_article(thing) for thing in scene.things]
    chance.shuffle(things)
    return _listed(things) + _background(scene, chance)


def with_article(thing: Thing) -> str:
    """A thing as captions name it: "a red circle", "an orange star"."""
    return f"{'an' if str(thing)[0] in 'aeiou' else 'a'} {thing}"


def parse_caption(text: str) -> Request:
    """What a caption asks for. Words that are none of scenes' are passed over."""
    text = " ".join(text.lower().split())
    found = list(_THING.finditer(text))
    things = tuple(Thing(each["color"], each["shape"], each["fill"] or FILLS[0]) for each in found)
    edges = [*(each.start() for each in found), len(text)]
    tails = [text[each.end() : edge] for each, edge in zip(found, edges[1:], strict=True)]
    parts, relations = [ANYWHERE] * len(things), list[Relation]()
    for index, tail in enumerate(tails):
        relation = _RELATION.search(tail)
        part = _PART.search(tail)
        if relation is not None and index + 1 < len(things):
            relations.append(Relation(index, _kind_of(relation[1]), index + 1))
        elif part is not None:
            parts[index] = PARTS[part[1]]
    background = _BACKGROUND.search(text)
    return Request(things, tuple(parts), tuple(relations), background[1] if background else None)


def _relation(first: int, second: int, chance: Random) -> str:
    kind = chance.choice([kind for kind in RELATIONS if holds(kind, first, second)])
    return chance.choice(SYNONYMS[kind])


def _kind_of(word: str) -> str:
    return next(kind for kind, words in SYNONYMS.items() if word in words)


def _part(place: int, corner: str, chance: Random) -> str:
    """Three times in four the very place, else the half of the picture that it lies in."""
    if chance.random() < 0.75:
        return chance.choice(["in the {}", "at the {}", f"in the {{}}{corner}"]).format(PLACES[place])
    row, column = PLACES[place].split()
    return chance.choice([f"at the {row}", f"on the {column}"])


def _background(scene: Scene, chance: Random) -> str:
    """Named half of the time."""
    if chance.random() < 0.5:
        return chance.choice([" on {}", " on a {} background"]).format(scene.background)
    return ""


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
