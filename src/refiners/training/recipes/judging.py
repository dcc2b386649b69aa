"""How far an adapter that trains on scenes leads the model, as the reader of scenes sees it."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from random import Random
from typing import Any

from PIL import Image

from refiners.fluxion.utils import tensor_to_image
from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.scenes import (
    Split,
    caption_without_places,
    make_scenes,
    score_carried,
    score_layout,
)
from refiners.foundationals.scenes.controls import CONTROLS, one_thing_of
from refiners.training.randomness import generator_for
from refiners.training.recipes.config import TextToImageConfig
from refiners.training.recipes.leading import Lead, Show
from refiners.training.trainer import Callback, Trainer

BATCH_SIZE = 50


class JudgeScenes(Callback):
    """Tells, at each evaluation, how many of `dataset.scenes.judged` scenes came out as they should."""

    def __init__(self, sd: StableDiffusion_1, config: TextToImageConfig, lead: Lead) -> None:
        assert config.dataset.scenes is not None
        self.sd, self.settings, self.lead = sd, config.dataset.scenes, lead
        self.seed, self.test = config.training.evaluation_seed, config.test_diffusion

    def on_evaluate(self, trainer: Trainer) -> None:
        """Log "scenes/things" and so on, shares of the pictures, and print them."""
        settings = self.settings
        if not settings.judged:
            return
        options = {
            "num_inference_steps": self.test.num_inference_steps,
            "condition_scale": self.test.condition_scale,
        }
        shares = judge(self.sd, self.lead.show, settings.conditioning, settings.judged, self.seed, **options)
        trainer.log({f"scenes/{name}": share for name, share in shares.items()})
        if trainer.process.is_first:
            told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
            print(f"step {trainer.clock.step}, {settings.judged} scenes: {told}", file=sys.stderr, flush=True)


def judge(
    sd: StableDiffusion_1, show: Show, conditioning: str, count: int, seed: int = 0, **options: Any
) -> dict[str, float]:
    """Shares of `count` pictures of scenes of kinds that are held out from training, which the reader finds right.

    show: gives the adapter a picture for each that is made; one that does nothing judges the model without it.
    conditioning: a name in `CONTROLS`. With "thing" the prompt is empty, and what counts is whether that thing is
        there ("carried"). Else the prompt names the things, and what counts is where they are (see `LayoutScores`).
    options: of `StableDiffusion_1.generate`.
    """
    scenes = make_scenes(count, generator_for(seed, "judged"), Split.HELD_OUT)
    if conditioning == "thing":
        scenes = one_thing_of(scenes, generator_for(seed, "shown"))
    words, chance = scenes.to_list(), Random(seed)
    is_named = conditioning != "thing"
    prompts = [caption_without_places(scene, chance) if is_named else "" for scene in words]
    shown = CONTROLS[conditioning](scenes, generator_for(seed, "places"))
    images = generate(sd, show, prompts, [tensor_to_image(picture[None]) for picture in shown], seed, **options)
    if is_named:
        return asdict(score_layout(images, words))
    return {"carried": score_carried(images, [scene.things[0] for scene in words])}


def generate(
    sd: StableDiffusion_1,
    show: Show,
    prompts: Sequence[str],
    shown: Sequence[Image.Image],
    seed: int = 0,
    **options: Any,
) -> list[Image.Image]:
    """A picture for each prompt and each picture that is shown with it."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        show(shown[rows])
        seeds = [seed + start + number for number in range(len(prompts[rows]))]
        images += sd.generate(prompts[rows], seed=seeds, solver="ddim", show_progress=False, **options)
    return images
