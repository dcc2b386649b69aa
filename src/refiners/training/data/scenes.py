"""Scenes as pictures to train on, each with a picture that leads to it; see `refiners.foundationals.scenes`."""

import io
from collections.abc import Callable
from random import Random

from torch import Tensor

from refiners.fluxion.utils import tensor_to_image
from refiners.foundationals.scenes import Split, caption_without_places, draw_scenes, make_scenes
from refiners.foundationals.scenes.controls import CONTROLS
from refiners.training.data.pictures import Picture
from refiners.training.randomness import generator_for


def draw_pictures(count: int, conditioning: str, seed: int) -> list[Picture]:
    """Scenes of the kinds that models may train on; captions name the things, and not where they are.

    conditioning: what leads to each scene, a name in `CONTROLS`.
    """
    scenes = make_scenes(count, generator_for(seed, "scenes"), Split.TRAIN)
    chance = Random(seed)
    images = (draw_scenes(scenes, generator_for(seed, "places")) + 1) / 2
    controls = CONTROLS[conditioning](scenes, generator_for(seed, "places"))
    return [
        Picture(f"scene {number}", _reader(image), caption_without_places(scene, chance), conditioning=_reader(control))
        for number, (scene, image, control) in enumerate(zip(scenes.to_list(), images, controls, strict=True))
    ]


def _reader(image: Tensor) -> Callable[[], bytes]:
    file = io.BytesIO()
    tensor_to_image(image[None]).save(file, format="PNG")
    return file.getvalue
