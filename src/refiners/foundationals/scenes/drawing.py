"""Draws scenes: 32 x 32 pixels, a thing about 12 pixels wide in each 16 x 16 quarter, edges smoothed.

A shape is a signed distance: how far a pixel's centre is from its edge, negative inside. x goes right and y down.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from refiners.foundationals.scenes.scene import BACKGROUNDS, COLORS, FILLS, SHAPES, UNSEEN_FILL, Scenes

IMAGE_SIZE = 32
CELL_SIZE = IMAGE_SIZE // 2
RADIUS = 6.0  # half of a thing's width, in pixels
RADIUS_SPREAD = 0.5
JITTER = 1.5  # how far the middle of a thing is from that of its place, at most, along each side
STRIPE_SHADE = 0.25  # what the colour is multiplied with in the dark stripes


def draw_scenes(scenes: Scenes, generator: torch.Generator) -> Float[Tensor, "b 3 32 32"]:
    """Pictures of scenes, (B, 3, 32, 32) in [-1, 1]. By lot are each thing's exact place and size."""
    coverage = (0.5 - distances(scenes, generator)).clamp(0, 1)
    colors = torch.tensor([*COLORS.values()])[scenes.colors] / 127.5 - 1
    backgrounds = torch.tensor([*BACKGROUNDS.values()])[scenes.backgrounds] / 127.5 - 1
    paint = _stripes(scenes.fills, colors[..., None, None])
    return assemble(torch.lerp(backgrounds[:, None, :, None, None], paint, coverage[:, :, None]))


def distances(scenes: Scenes, generator: torch.Generator) -> Float[Tensor, "b 4 16 16"]:
    """How far each pixel of each quarter is from the edge of its thing, in pixels; negative inside of it."""
    count = scenes.shapes.shape
    offset = (2 * torch.rand(*count, 2, generator=generator) - 1) * JITTER
    radius = RADIUS + (2 * torch.rand(*count, generator=generator) - 1) * RADIUS_SPREAD
    centres = torch.arange(CELL_SIZE) + 0.5 - CELL_SIZE / 2
    x = (centres - offset[..., 0, None])[..., None, :].expand(*count, CELL_SIZE, CELL_SIZE)
    y = (centres - offset[..., 1, None])[..., :, None].expand(*count, CELL_SIZE, CELL_SIZE)
    return _distance(scenes.shapes, x, y, radius[..., None, None])


def assemble(quarters: Float[Tensor, "b 4 c 16 16"]) -> Float[Tensor, "b c 32 32"]:
    """Pictures from their four quarters."""
    grid = quarters.reshape(-1, 2, 2, *quarters.shape[2:])
    rows = grid.permute(0, 3, 1, 4, 2, 5)  # b, channel, row, y, column, x
    return rows.reshape(len(quarters), -1, IMAGE_SIZE, IMAGE_SIZE)


def foreground(scenes: Scenes, images: Tensor) -> Float[Tensor, "b 1 32 32"]:
    """Which pixels of drawn pictures are not plain background: 1 or 0."""
    backgrounds = torch.tensor([*BACKGROUNDS.values()])[scenes.backgrounds] / 127.5 - 1
    return ((images - backgrounds[:, :, None, None]).abs().amax(1, keepdim=True) > 1e-3).float()


def _stripes(fills: Tensor, colors: Tensor) -> Tensor:
    """Where the filling is striped, two dark rows after two bright ones; in step with the picture, not the thing."""
    is_dark = (torch.arange(CELL_SIZE) % 4 >= 2)[:, None]
    is_striped = (fills == FILLS.index(UNSEEN_FILL))[..., None, None, None]
    black = torch.tensor(-1.0)
    return torch.where(is_striped & is_dark, torch.lerp(black, colors, STRIPE_SHADE), colors)


def _distance(shapes: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distances in pixels, each of the shape asked; far outside for no shape."""
    distance = torch.full(x.shape, float(IMAGE_SIZE))
    u, v = x.abs() / radius, y / radius  # every shape is its own mirror image
    for number, name in enumerate(SHAPES):
        chosen = shapes == number
        distance[chosen] = DISTANCES[name](u[chosen], v[chosen]) * radius[chosen]
    return distance


def _circle(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - 1


def _square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u, v.abs()) - 0.88


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    """Tip at (0, -1), feet at (±1.05, 0.85)."""
    slope = (u * 1.85 - (v + 1) * 1.05) / math.hypot(1.85, 1.05)
    return torch.maximum(slope, v - 0.85)


def _diamond(u: Tensor, v: Tensor) -> Tensor:
    return (u + v.abs() - 1.1) / math.sqrt(2)


def _cross(u: Tensor, v: Tensor) -> Tensor:
    long, short = 1.05, 0.36
    lying = torch.maximum(u - long, v.abs() - short)
    standing = torch.maximum(u - short, v.abs() - long)
    return torch.minimum(lying, standing)


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return (torch.hypot(u, v) - 0.78).abs() - 0.26


def _star(u: Tensor, v: Tensor) -> Tensor:
    """Five points at distance 1.15; the notches between them at 0.5. One edge, folded ten times."""
    outer, inner, half = 1.15, 0.5, math.pi / 5
    angle = torch.atan2(u, -v)
    folded = (angle - 2 * half * torch.round(angle / (2 * half))).abs()
    length = torch.hypot(u, v)
    along, across = length * torch.cos(folded), length * torch.sin(folded)
    notch_along, notch_across = inner * math.cos(half), inner * math.sin(half)
    edge_along, edge_across = notch_along - outer, notch_across
    cross_product = (along - outer) * edge_across - across * edge_along
    return cross_product / math.hypot(edge_along, edge_across)


def _heart(u: Tensor, v: Tensor) -> Tensor:
    """Two discs and the wedge below them, whose sides touch the discs and meet at (0, 0.95)."""
    discs = torch.hypot(u - 0.45, v + 0.3) - 0.52
    sides = (0.731 * u + 0.682 * v) - 0.648
    return torch.minimum(discs, torch.maximum(sides, -v - 0.08))


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "ring": _ring,
    "star": _star,
    "heart": _heart,
}
