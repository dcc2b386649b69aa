"""How well the embedded model obeys captions of scenes that are held out from training."""

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from refiners.foundationals.latent_diffusion.autoencoder import LatentDiffusionAutoencoder
from refiners.foundationals.latent_diffusion.embedded import EMBEDDED_SOLVER_PARAMS
from refiners.foundationals.scenes.captions import caption_of
from refiners.foundationals.scenes.scene import Split, make_scenes
from refiners.foundationals.scenes.scoring import Scores, score
from refiners.solvers import DDIM
from refiners.training.pretraining.diffusion import TextToLatents

GUIDANCE = 2.0  # more makes things come up twice where a caption leaves their places open


def held_out_captions(count: int, seed: int = 0, split: Split = Split.HELD_OUT) -> list[str]:
    """Captions of scenes with combinations that training never had."""
    scenes = make_scenes(count, torch.Generator().manual_seed(1_000 + seed), split)
    chance = Random(1_000 + seed)
    return [caption_of(scene, chance) for scene in scenes.to_list()]


@torch.no_grad()
def generate(
    model: TextToLatents,
    lda: LatentDiffusionAutoencoder,
    captions: Sequence[str],
    steps: int = 20,
    guidance: float = GUIDANCE,
    seed: int = 0,
) -> Tensor:
    """Pictures of captions, (B, 3, 32, 32) in about [-1, 1], by DDIM with classifier-free guidance."""
    count, solver = len(captions), DDIM(steps, params=EMBEDDED_SOLVER_PARAMS)
    x = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    text = model.clip_text_encoder([*captions, *[""] * count])
    for step in solver.inference_steps:
        model.unet.set_timestep(solver.timesteps[step].expand(2 * count))
        model.unet.set_clip_text_embedding(text)
        with_caption, without = model.unet(torch.cat([x, x])).chunk(2)
        x = solver(x, without + guidance * (with_caption - without), step)
    return lda.decode(x)


def evaluate(
    model: TextToLatents,
    lda: LatentDiffusionAutoencoder,
    count: int = 500,
    guidance: float = GUIDANCE,
    split: Split = Split.HELD_OUT,
    seed: int = 0,
) -> Scores:
    """Scores on `count` captions, 20 steps each."""
    captions = held_out_captions(count, seed, split)
    images = torch.cat(
        [
            generate(model, lda, captions[start : start + 100], guidance=guidance, seed=seed + start)
            for start in range(0, count, 100)
        ]
    )
    return score(images, captions)
