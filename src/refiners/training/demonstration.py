"""A LoRA that teaches the embedded model the shape that it never saw, trained and judged in minutes on a CPU.

The reader, which knows the shape, judges the pictures before and after, with the LoRA and without it again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from PIL import Image

from refiners.fluxion.contact_sheet import contact_sheet
from refiners.fluxion.utils import tensor_to_image
from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.lora import LoraWeights
from refiners.foundationals.scenes import (
    Scene,
    Scenes,
    Scores,
    Split,
    Thing,
    caption_of,
    draw_scenes,
    make_scenes,
    score,
)
from refiners.foundationals.scenes.scene import BACKGROUNDS, COLORS, PLACES, UNSEEN_SHAPE
from refiners.training.distributed import Process
from refiners.training.recipes.lora import LoraTrainingConfig, run

NAME = UNSEEN_SHAPE
PICTURES = 384
SHARE_OF_OTHERS = 0.25  # pictures without the new shape, so that the model keeps what it can
BATCH_SIZE = 32
PROMPTS = 48  # of each kind, to judge by
SAMPLING_STEPS = 20
SHOWN = (
    f"a red {NAME} on white",
    f"a green {NAME} in the top left on black",
    f"a blue {NAME} at the bottom right",
    f"a yellow circle above a purple {NAME}",
    "a red circle on white",
)
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Demonstration:
    """What came of it. The scores are of prompts with the new shape and of others, without the LoRA and with it."""

    new_before: Scores
    new_after: Scores
    others_before: Scores
    others_after: Scores
    is_restored: bool
    lora: Path
    comparison: Path

    def lines(self) -> list[str]:
        """The result in words."""
        return [
            f"prompts with a {NAME}: all things right in {self.new_before.things:.0%} before, "
            f"{self.new_after.things:.0%} with the LoRA ({PROMPTS} prompts)",
            f"other prompts: {self.others_before.things:.0%} before, {self.others_after.things:.0%} with the LoRA",
            f"ejected, the model draws {'the very same' if self.is_restored else 'OTHER'} pictures as before",
            f"LoRA: {self.lora}",
            f"comparison: {self.comparison}",
        ]


def demonstrate(folder: Path, steps: int) -> Demonstration:
    """Draw pictures, train on them, and compare. What is in `folder` already is used."""
    pictures = folder / "pictures"
    write_pictures(pictures)
    run(make_config(folder, pictures, steps), Process())
    lora = folder / f"{NAME}.safetensors"
    sd = StableDiffusion_1.from_pretrained("builtin")
    prompts, others = prompts_with_the_shape(PROMPTS, seed=1), prompts_without(PROMPTS, seed=1)
    before = judge(sd, prompts), judge(sd, others)
    plain = draw(sd, SHOWN)
    weights = LoraWeights(lora)
    weights.patch(sd)
    after = judge(sd, prompts), judge(sd, others)
    rows: list[list[Image.Image]] = []
    for scale in SCALES:
        weights.scale = scale
        rows.append(draw(sd, SHOWN))
    weights.eject()
    is_restored = all(a.tobytes() == b.tobytes() for a, b in zip(plain, draw(sd, SHOWN), strict=True))
    comparison = folder / "comparison.png"
    titles = ["base", *(f"LoRA x {scale:g}" for scale in SCALES)]
    contact_sheet([plain, *rows], titles, SHOWN).save(comparison)
    return Demonstration(before[0], after[0], before[1], after[1], is_restored, lora, comparison)


def make_config(folder: Path, pictures: Path, steps: int) -> LoraTrainingConfig:
    """The settings of the training."""
    return LoraTrainingConfig.model_validate(
        {
            "lora": {
                "rank": 16,
                "name": NAME,
                "unet_targets": ["Attention", "SelfAttention", "FeedForward", "ResidualBlock"],
                "layers": ["Linear", "Conv2d"],
            },
            "dataset": {"folder": pictures},
            "latent_diffusion": {"unconditional_sampling_probability": 0.1},
            "training": {"duration": f"{steps}:step", "batch_size": BATCH_SIZE, "device": "cpu"},
            "optimizer": {"learning_rate": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.0},
            "scheduler": {"scheduler_type": "cosine", "warmup_steps": 10},
            "checkpointing": {"save_folder": folder, "save_interval": "100:step"},
            "logging": {"tensorboard": False},
        }
    )


def write_pictures(folder: Path, count: int = PICTURES) -> None:
    """Pictures with their captions beside them, the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = Random(0)
    number_of_others = round(count * SHARE_OF_OTHERS)
    others = make_scenes(number_of_others, torch.Generator().manual_seed(0), Split.TRAIN).to_list()
    scenes = [*(scene_with_the_shape(chance) for _ in range(count - number_of_others)), *others]
    images = draw_scenes(Scenes.from_list(scenes), torch.Generator().manual_seed(0))
    for index, scene in enumerate(scenes):
        tensor_to_image((images[index : index + 1] + 1) / 2).save(folder / f"{index:04}.png")
        (folder / f"{index:04}.txt").write_text(caption_of(scene, chance), encoding="utf-8")


def scene_with_the_shape(chance: Random) -> Scene:
    """One new thing, and in half of the scenes another one that the model knows."""
    generator = torch.Generator().manual_seed(chance.getrandbits(32))
    known = make_scenes(1, generator, Split.TRAIN).to_list()[0].things[0]
    things: list[Thing | None] = [Thing(chance.choice(list(COLORS)), UNSEEN_SHAPE)]
    things += [known] if chance.random() < 0.5 else []
    things += [None] * (len(PLACES) - len(things))
    chance.shuffle(things)
    return Scene(tuple(things), chance.choice(list(BACKGROUNDS)))


def prompts_with_the_shape(count: int, seed: int) -> list[str]:
    """Captions of scenes with the new shape that are none of the training's."""
    chance = Random(f"prompts {seed}")
    return [caption_of(scene_with_the_shape(chance), chance) for _ in range(count)]


def prompts_without(count: int, seed: int) -> list[str]:
    """Captions of scenes that the model knows."""
    chance = Random(f"others {seed}")
    scenes = make_scenes(count, torch.Generator().manual_seed(100 + seed), Split.TRAIN)
    return [caption_of(scene, chance) for scene in scenes.to_list()]


def draw(sd: StableDiffusion_1, prompts: Sequence[str]) -> list[Image.Image]:
    """A picture of each prompt; the same noise each time."""
    return sd.generate(
        prompts,
        seed=list(range(len(prompts))),
        num_inference_steps=SAMPLING_STEPS,
        solver="ddim",
        show_progress=False,
    )


def judge(sd: StableDiffusion_1, prompts: Sequence[str]) -> Scores:
    """How well the model obeys, as the reader sees it."""
    return score(draw(sd, prompts), prompts)
