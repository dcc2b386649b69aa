"""Teaches the text encoder to read captions, before there is any picture: which thing should be in which place?

A head of four learned queries, one for each place, attends to the tokens as the UNet will. A caption that allows
several scenes teaches how likely each is. The head is thrown away; the UNet starts with words that mean something.
"""

from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.foundationals.clip.text_encoder import CLIPTextEncoder, CLIPTextSpec
from refiners.foundationals.latent_diffusion.embedded import make_text_encoder
from refiners.foundationals.scenes.captions import caption_of
from refiners.foundationals.scenes.reader import READER_CLASSES
from refiners.foundationals.scenes.scene import PLACES, Split, make_scenes
from refiners.training.pretraining.loop import Plan, reporter, train
from refiners.training.pretraining.reader import cross_entropy

PLAN = Plan(steps=1000, peak_rate=1e-3, averaging=0.99, report_every=100, save_every=250)
BATCH_SIZE = 96
FIRST_DEVIATION = 0.05


class Places(fl.Chain):
    """Token vectors (B, L, D) to scores (B, READER_CLASSES, 4), as the reader gives them for pictures."""

    def __init__(self, spec: CLIPTextSpec) -> None:
        width = spec.embedding_dim
        super().__init__(
            fl.Parallel(fl.Parameter(len(PLACES), width), fl.Identity(), fl.Identity()),
            fl.Attention(width, num_heads=spec.num_attention_heads),
            fl.Residual(fl.LayerNorm(width), fl.Linear(width, 4 * width), fl.GeLU(), fl.Linear(4 * width, width)),
            fl.LayerNorm(width),
            fl.Linear(width, READER_CLASSES),
            fl.Transpose(1, 2),
        )


def train_text_encoder(folder: Path, plan: Plan = PLAN) -> CLIPTextEncoder:
    """A text encoder that was taught in `folder`."""
    torch.manual_seed(4)
    encoder = make_text_encoder()
    begin_small(encoder)
    whole = fl.Chain(encoder, Places(encoder.spec))
    train("text_encoder", whole, plan, lambda generator: text_loss(whole, generator), folder, reporter(folder))
    whole.remove(encoder)
    return encoder


def begin_small(encoder: CLIPTextEncoder) -> None:
    """Words and positions begin as small vectors, so that they can soon be what they should."""
    for embedding in encoder.layers(fl.Embedding):
        nn.init.normal_(embedding.weight, std=FIRST_DEVIATION)


def text_loss(whole: fl.Chain, generator: torch.Generator) -> Tensor:
    """Cross-entropy of the scene from its caption."""
    scenes = make_scenes(BATCH_SIZE, generator, Split.TRAIN)
    chance = Random(generator.initial_seed())
    scores = whole([caption_of(scene, chance) for scene in scenes.to_list()])
    return cross_entropy(scores, scenes)
