"""The reader that comes with the package, and the scores that are made with it."""

import math

import pytest
import torch

from refiners.fluxion.utils import tensor_to_images
from refiners.foundationals.scenes import Scene, Scenes, Thing, draw_scenes, make_scenes, read_scenes, score
from refiners.foundationals.scenes.captions import parse_caption
from refiners.foundationals.scenes.scoring import average, score_scene

RED, BLUE = Thing("red", "circle"), Thing("blue", "square")
SCENE = Scene((RED, None, BLUE, None), "white")  # red in the top left, blue below it


@pytest.mark.slow
def test_the_reader_is_right_on_at_least_99_percent_of_drawings() -> None:
    generator = torch.Generator().manual_seed(12345)
    scenes = make_scenes(400, generator, has_unseen=True)
    found = read_scenes(draw_scenes(scenes, generator))
    exact = sum(one == other for one, other in zip(found, scenes.to_list(), strict=True))
    assert exact >= 396


def test_images_and_tensors_are_read_alike() -> None:
    generator = torch.Generator().manual_seed(1)
    pictures = draw_scenes(make_scenes(20, generator), generator)
    assert read_scenes(tensor_to_images((pictures + 1) / 2)) == read_scenes(pictures)


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="64"):
        read_scenes(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("caption", "things", "present", "places", "background"),
    [
        ("a red circle above a blue square on white", True, True, True, True),
        ("a blue square under a red circle on black", True, True, True, False),
        ("a red circle to the right of a blue square", True, True, False, None),
        ("a red circle and a blue square", True, True, None, None),
        ("a red circle in the top left", False, True, True, None),
        ("a red circle on the right", False, True, False, None),
        ("a blue circle in the top left", False, False, False, None),
        ("a red circle, a blue square and a red circle", False, False, None, None),
    ],
)
def test_scores(caption: str, things: bool, present: bool, places: bool | None, background: bool | None) -> None:
    found = score_scene(SCENE, parse_caption(caption))
    assert (found.things, found.present, found.places, found.background) == (things, present, places, background)


def test_swapped_colours_are_right_shapes_and_right_colours_but_wrong_things() -> None:
    found = score_scene(SCENE, parse_caption("a blue circle and a red square"))
    assert (found.things, found.shapes, found.colors) == (False, True, True)


def test_scores_are_averaged_over_those_that_are_asked() -> None:
    captions = ["a red circle above a blue square", "a red circle under a blue square", "a red circle"]
    found = average([score_scene(SCENE, parse_caption(caption)) for caption in captions])
    assert found.things == pytest.approx(2 / 3) and found.present == 1 and found.places == 0.5
    assert math.isnan(found.background) and found.count == 3
    assert "places 50.0%" in str(found)


def test_drawn_pictures_score_full() -> None:
    scenes = Scenes.from_list([SCENE] * 8)
    images = draw_scenes(scenes, torch.Generator().manual_seed(0))
    found = score(images, ["a red circle in the top left and a blue square in the bottom left on white"] * 8)
    assert (found.things, found.places, found.background) == (1, 1, 1)


def test_scores_of_nothing_are_refused() -> None:
    images = draw_scenes(Scenes.from_list([SCENE]), torch.Generator())
    with pytest.raises(ValueError, match="1 pictures and 2 captions"):
        score(images, ["a red circle"] * 2)
    with pytest.raises(ValueError, match="a cat"):
        score(images, ["a cat"])
