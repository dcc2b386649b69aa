"""Pictures that say what to draw: they lie over what is drawn, and tell no more than they should."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from refiners.fluxion.utils import image_to_tensor
from refiners.foundationals.scenes import (
    LayoutScores,
    Scene,
    Scenes,
    Split,
    Thing,
    draw_scenes,
    make_scenes,
    read_scenes,
    score_carried,
    score_layout,
)
from refiners.foundationals.scenes.controls import (
    CLASS_COLORS,
    CONTROLS,
    draw_boxes,
    draw_classes,
    draw_controls,
    draw_edges,
    draw_thing,
    one_thing_of,
)
from refiners.foundationals.scenes.drawing import foreground
from refiners.foundationals.scenes.reader import load_image_encoder
from refiners.foundationals.scenes.scene import COLORS, NOTHING, SHAPES


def lot(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SCENES = make_scenes(200, lot(1), has_unseen=True)
PICTURES = draw_scenes(SCENES, lot())


def test_classes_are_where_the_things_are_and_of_the_colours_of_their_shapes() -> None:
    classes, drawn = draw_classes(SCENES, lot()), foreground(SCENES, PICTURES)
    is_inside = classes.amax(1, keepdim=True) > 0
    assert (drawn[is_inside] == 1).all()
    assert is_inside.sum() > 0.75 * drawn.sum()  # all but the smoothed edges
    for number in range(len(SHAPES)):
        of_one = classes[(SCENES.shapes == number).any(1) & (SCENES.is_there.sum(1) == 1)]
        assert set(map(tuple, of_one.movedim(1, -1).flatten(0, 2).tolist())) == {
            (0.0, 0.0, 0.0),
            tuple(CLASS_COLORS[number].tolist()),
        }
    assert len({tuple(color) for color in CLASS_COLORS.tolist()}) == NOTHING + 1


def test_outlines_are_at_the_edges_and_tell_neither_colour_nor_background() -> None:
    edges, drawn = draw_edges(SCENES, lot()), foreground(SCENES, PICTURES)
    padded = torch.nn.functional.pad(drawn, (1, 1, 1, 1), mode="replicate")
    near = torch.nn.functional.max_pool2d(padded, 3, 1) + torch.nn.functional.max_pool2d(-padded, 3, 1)
    is_line = edges[:, :1] >= 0.75
    assert near[is_line].mean() > 0.95 and is_line.any((1, 2, 3)).all()
    other = type(SCENES)(
        SCENES.shapes, SCENES.colors.flip(0) * SCENES.is_there, SCENES.fills, SCENES.backgrounds.flip(0)
    )
    assert torch.equal(draw_edges(other, lot()), edges)


def test_boxes_tell_where_things_are_and_of_which_colour_and_not_of_which_shape() -> None:
    boxes = draw_boxes(SCENES, lot())
    quarters = boxes.reshape(-1, 3, 2, 16, 2, 16).amax((3, 5)).flatten(2).movedim(1, -1) * 255
    colors = torch.tensor([*COLORS.values()])[SCENES.colors] * SCENES.is_there[..., None]
    torch.testing.assert_close(quarters, colors.float())
    circles = torch.where(SCENES.is_there, torch.tensor(0), torch.tensor(NOTHING))
    assert torch.equal(draw_boxes(replace(SCENES, shapes=circles), lot()), boxes)


def test_an_image_prompt_shows_one_thing_of_its_scene_wherever_it_is_there() -> None:
    alone = one_thing_of(SCENES, lot(7)).to_list()
    words = SCENES.to_list()
    assert all(len(one.things) == 1 and one.things[0] in scene.things for one, scene in zip(alone, words, strict=True))
    assert {place for one in alone for place in range(4) if one.places[place]} == {0, 1, 2, 3}
    pictures = draw_thing(SCENES, lot(7)) * 2 - 1
    read = read_scenes(pictures)
    assert sum(a == b for a, b in zip(read, alone, strict=True)) >= 0.99 * len(alone)


@pytest.mark.parametrize("kind", CONTROLS)
def test_pictures_of_a_scene_are_the_same_each_time(kind: str) -> None:
    scenes = make_scenes(3, lot(2), Split.HELD_OUT).to_list()
    images = draw_controls(scenes, kind, seed=5)
    assert all(image.mode == "RGB" and image.size == (32, 32) for image in images)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in draw_controls(scenes, kind, seed=5)]
    assert [image.tobytes() for image in images] != [image.tobytes() for image in draw_controls(scenes, kind, seed=6)]


def test_a_kind_that_there_is_not_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no control 'depth' of scenes, only edges, classes, boxes, thing"):
        draw_controls([Scene((Thing("red", "circle"), None, None, None), "white")], "depth")


def test_the_image_encoder_tells_things_apart_and_takes_pictures_and_tensors() -> None:
    encoder = load_image_encoder()
    pixels = draw_thing(SCENES, lot(7))
    images = draw_controls(SCENES.to_list()[:4], "thing", seed=7)
    features = encoder(images)
    assert features.shape == (4, 96)
    assert torch.equal(encoder(images[0]), encoder([images[0]]))
    tensors = torch.cat([image_to_tensor(image) for image in images]) * 2 - 1
    torch.testing.assert_close(encoder(tensors), features, rtol=0, atol=1e-5)
    assert torch.pdist(encoder(pixels * 2 - 1)).min() > 0
    assert torch.equal(encoder(Image.new("L", (8, 9), 255)), encoder(Image.new("RGB", (32, 32), "white")))
    with pytest.raises(ValueError, match="32, 32"):
        encoder(torch.zeros(1, 3, 8, 8))


RED_CIRCLE, BLUE_STAR = Thing("red", "circle"), Thing("blue", "star")
WANTED = Scene((RED_CIRCLE, None, None, BLUE_STAR), "white")


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ((RED_CIRCLE, None, None, BLUE_STAR), (1, 1, 1, 1)),
        ((Thing("green", "circle"), None, None, BLUE_STAR), (1, 1, 0, 0)),
        ((Thing("red", "ring"), None, None, BLUE_STAR), (1, 0, 1, 0)),
        ((BLUE_STAR, None, None, RED_CIRCLE), (1, 0, 0, 0)),
        ((None, RED_CIRCLE, None, BLUE_STAR), (0, 0, 0, 0)),
        ((RED_CIRCLE, None, RED_CIRCLE, BLUE_STAR), (0, 0, 0, 0)),
    ],
)
def test_a_layout_is_judged_by_places_then_by_shapes_and_colours(
    places: tuple[Thing | None, ...], expected: tuple[int, ...]
) -> None:
    images = draw_scenes(Scenes.from_list([Scene(places, "gray")]), lot(3))
    assert score_layout(images, [WANTED]) == LayoutScores(*expected)


def test_a_thing_is_carried_wherever_it_is() -> None:
    images = draw_scenes(Scenes.from_list([WANTED, WANTED]), lot(3))
    assert score_carried(images, [RED_CIRCLE, Thing("red", "star")]) == 0.5
    with pytest.raises(ValueError, match="2 pictures and 1 things: give as many of both"):
        score_carried(images, [RED_CIRCLE])
