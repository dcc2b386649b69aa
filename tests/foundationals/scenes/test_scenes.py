"""Scenes: what is drawn by lot, what the pictures of it are, and what captions say of it."""

import math
from random import Random

import pytest
import torch
from torch import Tensor

from refiners.foundationals.clip.tokenizer import CLIPTokenizer
from refiners.foundationals.latent_diffusion.embedded import EMBEDDED_TEXT_ENCODER, EMBEDDED_VOCABULARY
from refiners.foundationals.scenes import (
    Scene,
    Scenes,
    Split,
    Thing,
    caption_of,
    draw_scenes,
    make_scenes,
    parse_caption,
)
from refiners.foundationals.scenes.captions import ANYWHERE, RELATIONS, SYNONYMS, Relation, Request, holds
from refiners.foundationals.scenes.drawing import foreground
from refiners.foundationals.scenes.scene import (
    BACKGROUNDS,
    COLORS,
    FILLS,
    PLACES,
    SHAPES,
    UNSEEN_FILL,
    UNSEEN_SHAPE,
)
from refiners.foundationals.scenes.scoring import score_scene


def lot(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_seed_gives_the_same_scenes_and_pictures() -> None:
    first, second = lot(), lot()
    assert make_scenes(20, first).to_list() == (scenes := make_scenes(20, second)).to_list()
    assert torch.equal(draw_scenes(scenes, first), draw_scenes(scenes, second))


def test_words_and_numbers_convert_both_ways() -> None:
    scenes = make_scenes(200, lot(), has_unseen=True)
    again = Scenes.from_list(scenes.to_list())
    assert again.to_list() == scenes.to_list()
    for one, other in zip(vars(scenes).values(), vars(again).values(), strict=True):
        assert torch.equal(one, other)


def test_training_and_held_out_scenes_share_no_combination() -> None:
    train, held_out = make_scenes(2000, lot(), Split.TRAIN), make_scenes(500, lot(1), Split.HELD_OUT)
    things = {thing for scene in train.to_list() for thing in scene.things}
    pairs = {(a.shape, b.shape) for scene in train.to_list() for a in scene.things for b in scene.things if a != b}
    assert len(things) == 7 * 8 * 3 / 4  # a quarter of the combinations is held out
    for scene in held_out.to_list():
        own_pairs = {(a.shape, b.shape) for a in scene.things for b in scene.things if a != b}
        assert any(thing not in things for thing in scene.things) or own_pairs - pairs
    assert not train.is_held_out.any() and held_out.is_held_out.all()


def test_scenes_have_one_to_three_different_things_and_unseen_ones_only_if_asked() -> None:
    plain, all_kinds = make_scenes(1000, lot()).to_list(), make_scenes(1000, lot(), has_unseen=True).to_list()
    for scene in plain:
        assert 1 <= len(scene.things) <= 3 and len(set(scene.things)) == len(scene.things)
        assert all(thing.shape != UNSEEN_SHAPE and thing.fill != UNSEEN_FILL for thing in scene.things)
    assert {thing.shape for scene in all_kinds for thing in scene.things} == set(SHAPES)
    assert {thing.fill for scene in all_kinds for thing in scene.things} == set(FILLS)


def test_a_drawing_equals_one_computed_pixel_by_pixel() -> None:
    scene = Scene((Thing("red", "circle"), None, Thing("blue", "square", "striped"), Thing("cyan", "diamond")), "gray")
    scenes = Scenes.from_list([scene])
    image = draw_scenes(scenes, lot(5))
    generator = lot(5)
    offsets = ((2 * torch.rand(1, 4, 2, generator=generator) - 1) * 1.5)[0].tolist()
    radii = (6 + (2 * torch.rand(1, 4, generator=generator) - 1) * 0.5)[0].tolist()
    for row in range(32):
        for column in range(32):
            place = 2 * (row // 16) + column // 16
            x = column % 16 + 0.5 - 8 - offsets[place][0]
            y = row % 16 + 0.5 - 8 - offsets[place][1]
            expected = pixel(scene, place, x, y, radii[place], row)
            assert image[0, :, row, column].tolist() == pytest.approx(expected, abs=1e-4), (row, column)


def pixel(scene: Scene, place: int, x: float, y: float, radius: float, row: int) -> list[float]:
    thing = scene.places[place]
    background = [value / 127.5 - 1 for value in BACKGROUNDS[scene.background]]
    if thing is None:
        return background
    distance = {
        "circle": lambda: math.hypot(x, y) - radius,
        "square": lambda: max(abs(x), abs(y)) - 0.88 * radius,
        "diamond": lambda: (abs(x) + abs(y) - 1.1 * radius) / math.sqrt(2),
    }[thing.shape]()
    coverage = min(max(0.5 - distance, 0), 1)
    color = [value / 127.5 - 1 for value in COLORS[thing.color]]
    if thing.fill == "striped" and row % 4 >= 2:
        color = [-1 + 0.25 * (value + 1) for value in color]
    return [coverage * own + (1 - coverage) * other for own, other in zip(color, background, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_fills_a_good_part_of_its_quarter_and_stays_in_it(shape: str) -> None:
    scenes = Scenes.from_list([Scene((Thing("red", shape), None, None, None), "white")] * 50)
    mask = foreground(scenes, draw_scenes(scenes, lot()))
    assert mask[:, :, 16:].sum() == 0 and mask[:, :, :, 16:].sum() == 0
    area = mask.sum((1, 2, 3))
    assert area.min() > 55 and area.max() < 220


def test_no_two_shapes_look_alike() -> None:
    scenes = Scenes.from_list([Scene((Thing("red", shape), None, None, None), "white") for shape in SHAPES])
    images = [draw_scenes(scenes[index : index + 1], lot()) for index in range(len(SHAPES))]
    for index, one in enumerate(images):
        for other in images[:index]:
            assert ((one - other).abs().amax(1) > 0.5).sum() > 10


@pytest.mark.parametrize("has_unseen", [False, True])
def test_the_scene_obeys_each_of_its_captions(has_unseen: bool) -> None:
    chance = Random(0)
    for scene in make_scenes(500, lot(), has_unseen=has_unseen).to_list():
        request = parse_caption(caption_of(scene, chance))
        obeyed = score_scene(scene, request)
        assert obeyed.things and obeyed.places is not False and obeyed.background is not False
        assert len(request.things) == len(scene.things)


def test_captions_use_every_word_there_is_and_fit_the_text_encoder() -> None:
    tokenizer = CLIPTokenizer(EMBEDDED_VOCABULARY, sequence_length=EMBEDDED_TEXT_ENCODER.max_sequence_length)
    chance, texts = Random(1), list[str]()
    for scene in make_scenes(1000, lot(), has_unseen=True).to_list():
        texts.append(caption_of(scene, chance))
    plain = [text for text in texts if "striped" not in text]
    assert not [text for text in plain if tokenizer.overflow(text)]
    words = " ".join(texts)
    expected = [*SHAPES, *COLORS, *FILLS[1:], *BACKGROUNDS, *PLACES, *sum(SYNONYMS.values(), ())]
    assert [word for word in expected if word not in words] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a red circle above a blue square",
            Request(
                (Thing("red", "circle"), Thing("blue", "square")),
                (ANYWHERE, ANYWHERE),
                (Relation(0, "above", 1),),
                None,
            ),
        ),
        (
            "A striped  green star in the top left on white",
            Request((Thing("green", "star", "striped"),), (frozenset({0}),), (), "white"),
        ),
        (
            "an orange heart on the right and a pink ring at the bottom on a black background",
            Request(
                (Thing("orange", "heart"), Thing("pink", "ring")),
                (frozenset({1, 3}), frozenset({2, 3})),
                (),
                "black",
            ),
        ),
        ("a cat on the left", Request((), (), (), None)),
    ],
)
def test_captions_are_understood(text: str, expected: Request) -> None:
    assert parse_caption(text) == expected


def test_relations_are_what_the_words_say() -> None:
    above = {(a, b) for a in range(4) for b in range(4) if holds("above", a, b)}
    assert above == {(0, 2), (0, 3), (1, 2), (1, 3)}
    for kind, opposite in (("above", "below"), ("left of", "right of")):
        assert kind in RELATIONS and opposite in RELATIONS
        for first in range(4):
            for second in range(4):
                assert holds(kind, first, second) == holds(opposite, second, first)


def test_a_scene_has_four_places() -> None:
    with pytest.raises(ValueError, match="not 2"):
        Scene((None, None), "white")


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match="hexagon"):
        Scenes.from_list([Scene((Thing("red", "hexagon"), None, None, None), "white")])


def test_values_of_pictures_are_in_range() -> None:
    images: Tensor = draw_scenes(make_scenes(100, lot(), has_unseen=True), lot())
    assert images.shape == (100, 3, 32, 32) and images.min() >= -1 and images.max() <= 1
