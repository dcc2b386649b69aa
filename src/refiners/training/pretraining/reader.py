"""Trains the reader of scenes on drawings, some of them noisy, as generated pictures are."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from refiners.foundationals.scenes.drawing import draw_scenes
from refiners.foundationals.scenes.reader import Reader, split_scores
from refiners.foundationals.scenes.scene import Scenes, make_scenes
from refiners.training.pretraining.loop import Plan, reporter, train

PLAN = Plan(steps=900, peak_rate=2e-3, averaging=0.99, report_every=100, save_every=300)
BATCH_SIZE = 64
MAX_NOISE = 0.25


def train_reader(folder: Path, plan: Plan = PLAN) -> Reader:
    """A reader trained in `folder`."""
    torch.manual_seed(0)
    reader = Reader()
    train("reader", reader, plan, lambda generator: reader_loss(reader, generator), folder, reporter(folder))
    return reader


def reader_loss(reader: Reader, generator: torch.Generator) -> Tensor:
    """Cross-entropy of everything that a picture has, on fresh noisy drawings."""
    scenes = make_scenes(BATCH_SIZE, generator, has_unseen=True)
    images = draw_scenes(scenes, generator)
    noise = torch.randn(images.shape, generator=generator)
    strength = MAX_NOISE * torch.rand(len(scenes), 1, 1, 1, generator=generator)
    return cross_entropy(reader(images + strength * noise), scenes)


def cross_entropy(scores: Tensor, scenes: Scenes) -> Tensor:
    """How far scores are from scenes; colour and filling count where there is a thing."""
    shapes, colors, fills, backgrounds = split_scores(scores)
    is_there = scenes.is_there
    background = scenes.backgrounds[:, None].expand(-1, 4)
    return (
        functional.cross_entropy(shapes, scenes.shapes)
        + functional.cross_entropy(colors, scenes.colors, reduction="none")[is_there].mean()
        + functional.cross_entropy(fills, scenes.fills, reduction="none")[is_there].mean()
        + functional.cross_entropy(backgrounds, background)
    )


def exact_share(reader: Reader, images: Tensor, scenes: Scenes) -> float:
    """In which share of pictures the reader finds exactly what the scenes say."""
    found = reader.read(images)
    is_exact = (
        (found.shapes == scenes.shapes).all(1)
        & (found.colors == scenes.colors).all(1)
        & (found.fills == scenes.fills).all(1)
        & (found.backgrounds == scenes.backgrounds)
    )
    return is_exact.float().mean().item()
