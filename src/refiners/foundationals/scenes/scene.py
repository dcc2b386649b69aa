"""Scenes: one to three coloured things in the four places of a picture, on a plain background.

`Scene` is one of them, in words. `Scenes` is a batch of them, in tensors: what is drawn and what is learned from.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self, cast

import torch
from torch import Tensor

Color = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "heart")
COLORS: dict[str, Color] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 220, 50),
    "orange": (245, 140, 30),
    "purple": (140, 50, 180),
    "pink": (250, 150, 200),
    "cyan": (60, 210, 225),
}
FILLS = ("plain", "striped")
BACKGROUNDS: dict[str, Color] = {
    "white": (250, 250, 250),
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "brown": (96, 64, 40),
}
PLACES = ("top left", "top right", "bottom left", "bottom right")  # place = 2 * row + column
NOTHING = len(SHAPES)  # the number of the shape of an empty place
SHARES = (0.4, 0.5, 0.1)  # of scenes with one thing, two, three
MAX_THINGS = len(SHARES)

# What the embedded model never saw, left to adapters to teach. The autoencoder and the reader know them.
UNSEEN_SHAPE = "heart"
UNSEEN_FILL = "striped"


class Split(StrEnum):
    """Which scenes to draw: those that models are trained on, those held out from training, or any."""

    TRAIN = "train"
    HELD_OUT = "held out"
    ANY = "any"


@dataclass(frozen=True)
class Thing:
    """A coloured shape. The words are those of `COLORS`, `SHAPES` and `FILLS`."""

    color: str
    shape: str
    fill: str = FILLS[0]

    def __str__(self) -> str:
        return f"{self.color} {self.shape}" if self.fill == FILLS[0] else f"{self.fill} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: the thing in each of the four `PLACES`, or None, and the background.

    Raises ValueError if there are not four.
    """

    places: tuple[Thing | None, ...]
    background: str

    def __post_init__(self) -> None:
        if len(self.places) != len(PLACES):
            raise ValueError(f"a scene has {len(PLACES)} places ({', '.join(PLACES)}), not {len(self.places)}")

    @property
    def things(self) -> list[Thing]:
        """The things, from the top left to the bottom right."""
        return [thing for thing in self.places if thing is not None]

    def __str__(self) -> str:
        things = [f"{thing} ({place})" for place, thing in zip(PLACES, self.places, strict=True) if thing]
        return f"{', '.join(things) or 'nothing'} on {self.background}"


@dataclass(frozen=True)
class Scenes:
    """B scenes as numbers: indices into `SHAPES` (or NOTHING), `COLORS`, `FILLS` (B, 4), and `BACKGROUNDS` (B,).

    Colour and filling of an empty place are 0.
    """

    shapes: Tensor
    colors: Tensor
    fills: Tensor
    backgrounds: Tensor

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return type(self)(self.shapes[rows], self.colors[rows], self.fills[rows], self.backgrounds[rows])

    @property
    def is_there(self) -> Tensor:
        """Whether there is a thing in each place, (B, 4)."""
        return self.shapes != NOTHING

    @property
    def is_held_out(self) -> Tensor:
        """Whether a scene has a thing, or two together, that no scene of training has, (B,).

        Of the (shape, colour) pairs a quarter is held out, evenly over both; of the pairs of shapes, four.
        """
        is_rare = self.is_there & ((self.shapes + self.colors) % 4 == 0)
        has = torch.stack([(self.shapes == shape).any(1) for shape in range(len(SHAPES))], dim=1)
        pairs = has & has.roll(-3, dims=1)  # each shape with the third one after it
        return is_rare.any(1) | pairs[:, :4].any(1)

    def to_list(self) -> list[Scene]:
        """The scenes in words."""
        colors, backgrounds = list(COLORS), list(BACKGROUNDS)
        numbers = cast("list[list[list[int]]]", torch.stack([self.shapes, self.colors, self.fills], dim=-1).tolist())
        of_backgrounds = cast("list[int]", self.backgrounds.tolist())
        return [
            Scene(
                tuple(
                    None if shape == NOTHING else Thing(colors[color], SHAPES[shape], FILLS[fill])
                    for shape, color, fill in places
                ),
                backgrounds[background],
            )
            for places, background in zip(numbers, of_backgrounds, strict=True)
        ]

    @classmethod
    def from_list(cls, scenes: Sequence[Scene]) -> Self:
        """Scenes in words as numbers. Raises ValueError for a word that there is not."""
        places = [[_numbers_of(thing) for thing in scene.places] for scene in scenes]
        numbers = torch.tensor(places, dtype=torch.int64).reshape(len(scenes), len(PLACES), 3)
        shapes, colors, fills = numbers.unbind(-1)
        of_backgrounds = [_number("background", scene.background, BACKGROUNDS) for scene in scenes]
        return cls(shapes, colors, fills, torch.tensor(of_backgrounds, dtype=torch.int64))


def _numbers_of(thing: Thing | None) -> tuple[int, int, int]:
    if thing is None:
        return NOTHING, 0, 0
    return (
        _number("shape", thing.shape, SHAPES),
        _number("color", thing.color, COLORS),
        _number("fill", thing.fill, FILLS),
    )


def _number(kind: str, word: str, words: Iterable[str]) -> int:
    known = list(words)
    if word not in known:
        raise ValueError(f"there is no {kind} {word!r} in scenes, only {', '.join(known)}")
    return known.index(word)


def make_scenes(
    count: int,
    generator: torch.Generator,
    split: Split = Split.ANY,
    has_unseen: bool = False,
) -> Scenes:
    """Draw `count` scenes by lot: one thing in four of ten, two in five, three in one; no two things alike.

    has_unseen: whether `UNSEEN_SHAPE` and `UNSEEN_FILL` come up too.
    """
    parts: list[Scenes] = []
    while sum(map(len, parts)) < count:
        parts.append(_chosen(_any_scenes(2 * count + 16, generator, has_unseen), split))
    joined = [torch.cat(tensors) for tensors in zip(*map(_tensors_of, parts), strict=True)]
    return Scenes(*joined)[:count]


def _tensors_of(scenes: Scenes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return scenes.shapes, scenes.colors, scenes.fills, scenes.backgrounds


def _any_scenes(count: int, generator: torch.Generator, has_unseen: bool) -> Scenes:
    size = (count, len(PLACES))
    things = 1 + torch.multinomial(torch.tensor(SHARES), count, replacement=True, generator=generator)
    ranks = torch.rand(size, generator=generator).argsort(dim=1)
    is_there = ranks < things[:, None]
    number_of_shapes = len(SHAPES) if has_unseen else SHAPES.index(UNSEEN_SHAPE)
    shapes = torch.randint(number_of_shapes, size, generator=generator)
    colors = torch.randint(len(COLORS), size, generator=generator)
    fills = (torch.rand(size, generator=generator) < (0.3 if has_unseen else 0.0)).long()
    backgrounds = torch.randint(len(BACKGROUNDS), (count,), generator=generator)
    return Scenes(shapes.where(is_there, torch.tensor(NOTHING)), colors * is_there, fills * is_there, backgrounds)


def _chosen(scenes: Scenes, split: Split) -> Scenes:
    """The scenes without two things of one shape and colour, and of this split."""
    kinds = scenes.shapes * len(COLORS) + scenes.colors
    empty = NOTHING * len(COLORS) + torch.arange(len(PLACES))  # each different from all others
    kinds = kinds.where(scenes.is_there, empty).sort(dim=1).values
    is_chosen = (kinds.diff(dim=1) != 0).all(1)
    if split != Split.ANY:
        is_chosen &= scenes.is_held_out == (split == Split.HELD_OUT)
    return scenes[is_chosen]
