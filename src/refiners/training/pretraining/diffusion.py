"""Trains the UNet of the embedded model, and its text encoder with it, on latents of scenes with captions.

The UNet tells velocity (arXiv 2202.00512, appendix D) on a schedule that ends without any signal (arXiv 2305.08891).
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import cast

import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.foundationals.clip.text_encoder import CLIPTextEncoder
from refiners.foundationals.latent_diffusion.autoencoder import LatentDiffusionAutoencoder
from refiners.foundationals.latent_diffusion.embedded import EMBEDDED_SOLVER_PARAMS, EMBEDDED_UNET
from refiners.foundationals.latent_diffusion.unet import OutputBlock, ResidualBlock, SpatialTransformer, UNet
from refiners.foundationals.scenes.captions import caption_of
from refiners.foundationals.scenes.drawing import draw_scenes
from refiners.foundationals.scenes.scene import Scenes, Split, make_scenes
from refiners.solvers.schedule import signal_powers
from refiners.training.pretraining.loop import Plan, reporter, train
from refiners.weights.files import read_metadata, read_safetensors, write_safetensors

PLAN = Plan(steps=9400, peak_rate=1e-3, averaging=0.999, decay=0.3)
BATCH_SIZE = 64
SCENE_COUNT = 40_000
TIMESTEP_POWER = 0.6  # what lies where is decided at high noise, and is harder than how it looks: more of that
CAPTION_DROPOUT = 0.1  # so that there is a prediction without caption to be guided away from (arXiv 2207.12598)


class TextToLatents(nn.Module):
    """The two parts that are trained together."""

    def __init__(self, unet: UNet, text_encoder: CLIPTextEncoder) -> None:
        super().__init__()
        self.unet = unet
        self.clip_text_encoder = text_encoder

    def forward(self, latents: Tensor, timesteps: Tensor, captions: Sequence[str]) -> Tensor:
        """Velocities (B, 4, 8, 8) of noisy latents (B, 4, 8, 8) at timesteps (B,)."""
        self.unet.set_timestep(timesteps)
        self.unet.set_clip_text_embedding(self.clip_text_encoder(captions))
        return self.unet(latents)


def new_unet() -> UNet:
    """The UNet as it begins."""
    torch.manual_seed(5)
    unet = UNet(EMBEDDED_UNET)
    begin_silent(unet)
    return unet


def train_diffusion(
    unet: UNet, lda: LatentDiffusionAutoencoder, text_encoder: CLIPTextEncoder, folder: Path, plan: Plan = PLAN
) -> TextToLatents:
    """Train the UNet and the text encoder in `folder`, where the latents are kept too."""
    model = TextToLatents(unet, text_encoder)
    latents, scenes = cached_latents(lda, folder / "latents.safetensors", SCENE_COUNT)
    words, things = scenes.to_list(), scenes.is_there.sum(1).float()  # a scene of two comes up twice as often as of one
    powers = torch.tensor(signal_powers(EMBEDDED_SOLVER_PARAMS), dtype=torch.float32)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.multinomial(things, BATCH_SIZE, replacement=True, generator=generator)
        chance = Random(generator.initial_seed())
        chosen = [words[row] for row in cast("list[int]", rows.tolist())]
        captions = ["" if chance.random() < CAPTION_DROPOUT else caption_of(scene, chance) for scene in chosen]
        return velocity_loss(model, latents[rows].float(), captions, powers, generator)

    train("diffusion", model, plan, loss_of, folder, reporter(folder))
    return model


def begin_silent(unet: UNet) -> None:
    """Have each residual block and each transformer begin as its shortcut, and the prediction as 0."""
    ends: list[nn.Module] = [*unet.layers(OutputBlock)]
    ends += [block.layer("Chain", fl.Chain) for block in unet.layers(ResidualBlock)]
    ends += [*unet.layers(SpatialTransformer)]
    for end in ends:
        last = [layer for layer in end.modules() if isinstance(layer, fl.Conv2d)][-1]
        nn.init.zeros_(last.weight)


def cached_latents(lda: LatentDiffusionAutoencoder, path: Path, count: int) -> tuple[Tensor, Scenes]:
    """Latents (count, 4, 8, 8), half precision, of scenes drawn for training, and the scenes.

    Read from `path` if they are there and of the same autoencoder, else written there.
    """
    scenes = make_scenes(count, torch.Generator().manual_seed(6), Split.TRAIN)
    recipe = {"count": str(count), "autoencoder": _digest(lda)}
    if not path.exists() or read_metadata(path) != recipe:
        write_safetensors(path, {"latents": _encode(lda, scenes)}, metadata=recipe)
    return read_safetensors(path)["latents"], scenes


@torch.no_grad()
def _encode(lda: LatentDiffusionAutoencoder, scenes: Scenes, batch_size: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    starts = range(0, len(scenes), batch_size)
    parts = [lda.encode(draw_scenes(scenes[start : start + batch_size], generator)).half() for start in starts]
    return torch.cat(parts)


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.float().numpy().tobytes())
    return digest.hexdigest()


def velocity_loss(
    model: TextToLatents, latents: Tensor, captions: Sequence[str], powers: Tensor, generator: torch.Generator
) -> Tensor:
    """Squared error of the velocity, at timesteps spread over the batch, denser where it is noisy.

    powers: ᾱ of each timestep.
    """
    count = len(latents)
    spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (spread**TIMESTEP_POWER * len(powers)).long()
    power = powers[timesteps, None, None, None]
    noise = torch.randn(latents.shape, generator=generator)
    noisy = power.sqrt() * latents + (1 - power).sqrt() * noise
    velocity = power.sqrt() * noise - (1 - power).sqrt() * latents
    return (model(noisy, timesteps, captions) - velocity).square().mean()
