"""The demonstration: what it trains on is the new shape, and what it shows is true."""

from pathlib import Path

import pytest
from PIL import Image

from refiners.foundationals.scenes import parse_caption
from refiners.foundationals.scenes.scene import UNSEEN_SHAPE
from refiners.training.demonstration import (
    PROMPTS,
    demonstrate,
    make_config,
    prompts_with_the_shape,
    prompts_without,
    write_pictures,
)


def test_three_of_four_pictures_show_the_new_shape(tmp_path: Path) -> None:
    write_pictures(tmp_path, 16)
    captions = [path.read_text() for path in sorted(tmp_path.glob("*.txt"))]
    assert len(captions) == len(list(tmp_path.glob("*.png"))) == 16
    assert sum(UNSEEN_SHAPE in caption for caption in captions) == 12
    with Image.open(next(tmp_path.glob("*.png"))) as picture:
        assert picture.size == (32, 32)


def test_prompts_ask_for_the_new_shape_or_for_known_ones() -> None:
    new, others = prompts_with_the_shape(20, seed=1), prompts_without(20, seed=1)
    assert all(any(thing.shape == UNSEEN_SHAPE for thing in parse_caption(text).things) for text in new)
    assert not any(UNSEEN_SHAPE in text for text in others)
    assert prompts_with_the_shape(20, seed=2) != new


def test_the_settings_are_those_of_the_recipe(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path / "pictures", 7)
    assert config.training.duration.number == 7
    assert config.models.base == "builtin"


@pytest.mark.slow
def test_a_demonstration_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    result = demonstrate(tmp_path, 2)
    assert result.is_restored
    assert result.new_before.count == result.others_after.count == PROMPTS
    assert result.new_before.things == 0.0  # the base never saw the shape
    assert result.lora.is_file() and result.comparison.is_file()
    assert any("the very same pictures" in line for line in result.lines())
