"""How well the embedded model obeys captions of scenes that are held out from training."""

from random import Random

import torch

from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.scenes import Scores, Split, caption_of, make_scenes, score

BATCH_SIZE = 100


def held_out_captions(count: int, seed: int = 0, split: Split = Split.HELD_OUT) -> list[str]:
    """Captions of scenes with combinations that training never had."""
    scenes = make_scenes(count, torch.Generator().manual_seed(1_000 + seed), split)
    chance = Random(1_000 + seed)
    return [caption_of(scene, chance) for scene in scenes.to_list()]


def evaluate(
    sd: StableDiffusion_1,
    count: int = 500,
    guidance: float | None = None,
    split: Split = Split.HELD_OUT,
    seed: int = 0,
) -> Scores:
    """Scores of a picture for each of `count` captions, made by DDIM in 20 steps.

    guidance: None for the model's own, 2: more makes things come up twice where a caption leaves their places open.
    """
    captions = held_out_captions(count, seed, split)
    images = [
        image
        for start in range(0, count, BATCH_SIZE)
        for image in sd.generate(
            captions[start : start + BATCH_SIZE],
            seed=[seed + number for number in range(start, min(start + BATCH_SIZE, count))],
            num_inference_steps=20,
            condition_scale=guidance,
            solver="ddim",
            show_progress=False,
        )
    ]
    return score(images, captions)
