"""Pictures that say what should be drawn, where words do not: outlines, classes, boxes, or a thing to take over.

Outlines, classes and boxes lie over the very things that `draw_scenes` draws with a generator of the same state.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from refiners.fluxion.utils import tensor_to_image
from refiners.foundationals.scenes.drawing import assemble, distances, draw_scenes
from refiners.foundationals.scenes.scene import BACKGROUNDS, COLORS, NOTHING, PLACES, SHAPES, Scene, Scenes

LINE_WIDTH = 1.5  # of outlines, in pixels
# Of the classes: the corners of the colour cube, but for black, and one more.
CLASS_COLORS = torch.tensor(
    [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1), (0.5, 0.5, 0.5), (0, 0, 0)]
)

Draw = Callable[[Scenes, torch.Generator], Tensor]


def draw_edges(scenes: Scenes, generator: torch.Generator) -> Float[Tensor, "b 3 32 32"]:
    """White outlines of the things on black: where they are and of which shape, not of which colour; in [0, 1]."""
    lines = (LINE_WIDTH / 2 + 0.5 - distances(scenes, generator).abs()).clamp(0, 1)
    return assemble(lines[:, :, None]).repeat(1, 3, 1, 1)


def draw_classes(scenes: Scenes, generator: torch.Generator) -> Float[Tensor, "b 3 32 32"]:
    """A segmentation: inside of each thing the colour that stands for its shape, black elsewhere; 0 or 1, or a half."""
    is_inside = distances(scenes, generator)[:, :, None] <= 0
    return assemble(CLASS_COLORS[scenes.shapes][..., None, None] * is_inside)


def draw_boxes(scenes: Scenes, generator: torch.Generator) -> Float[Tensor, "b 3 32 32"]:
    """A layout: a box in the colour of each thing on black, whatever its shape is; in [0, 1]."""
    square, nothing = torch.tensor(SHAPES.index("square")), torch.tensor(NOTHING)
    boxes = replace(scenes, shapes=torch.where(scenes.is_there, square, nothing))
    colors = torch.tensor([*COLORS.values()])[scenes.colors] / 255
    return assemble(colors[..., None, None] * (distances(boxes, generator)[:, :, None] <= 0))


def draw_thing(scenes: Scenes, generator: torch.Generator) -> Float[Tensor, "b 3 32 32"]:
    """An image prompt: one thing of each scene alone, at a place and on a background by lot; in [0, 1]."""
    return (draw_scenes(one_thing_of(scenes, generator), generator) + 1) / 2


def one_thing_of(scenes: Scenes, generator: torch.Generator) -> Scenes:
    """Scenes with one of the things of each alone; which one, at which place, on which background are by lot."""
    count, rows = len(scenes), torch.arange(len(scenes))
    chosen = torch.multinomial(scenes.is_there.float(), 1, generator=generator)[:, 0]
    place = torch.randint(len(PLACES), (count,), generator=generator)
    shapes = torch.full_like(scenes.shapes, NOTHING)
    colors, fills = torch.zeros_like(scenes.colors), torch.zeros_like(scenes.fills)
    shapes[rows, place] = scenes.shapes[rows, chosen]
    colors[rows, place] = scenes.colors[rows, chosen]
    fills[rows, place] = scenes.fills[rows, chosen]
    return Scenes(shapes, colors, fills, torch.randint(len(BACKGROUNDS), (count,), generator=generator))


# By the names that settings have for them.
CONTROLS: dict[str, Draw] = {"edges": draw_edges, "classes": draw_classes, "boxes": draw_boxes, "thing": draw_thing}


def draw_controls(scenes: Sequence[Scene], kind: str, seed: int = 0) -> list[Image.Image]:
    """A picture for each scene, of a kind in `CONTROLS`; that of a seed lies over what `draw_scenes` draws with it.

    Raises ValueError if there is no such kind.
    """
    if kind not in CONTROLS:
        raise ValueError(f"there is no control {kind!r} of scenes, only {', '.join(CONTROLS)}")
    pictures = CONTROLS[kind](Scenes.from_list(scenes), torch.Generator().manual_seed(seed))
    return [tensor_to_image(picture[None]) for picture in pictures]
