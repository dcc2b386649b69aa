"""Trains the UNet of the embedded model, and its text encoder with it, on latents of scenes with captions.

The UNet tells velocity (arXiv 2202.00512, appendix D) on a schedule that ends without any signal (arXiv 2305.08891).
"""

import hashlib
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.foundationals.clip.text_encoder import CLIPTextEncoder
from refiners.foundationals.clip.tokenizer import CLIPTokenizer
from refiners.foundationals.latent_diffusion.autoencoder import LatentDiffusionAutoencoder
from refiners.foundationals.latent_diffusion.embedded import (
    EMBEDDED_SOLVER_PARAMS,
    EMBEDDED_TEXT_ENCODER,
    EMBEDDED_UNET,
    EMBEDDED_VOCABULARY,
)
from refiners.foundationals.latent_diffusion.unet import OutputBlock, ResidualBlock, SpatialTransformer, UNet
from refiners.foundationals.scenes.captions import caption_of, caption_without_places
from refiners.foundationals.scenes.drawing import draw_scenes
from refiners.foundationals.scenes.scene import Scenes, Split, make_scenes
from refiners.solvers.schedule import signal_powers
from refiners.training.pretraining.loop import Plan, reporter, train
from refiners.weights.files import read_with_metadata, write_safetensors

PLAN = Plan(steps=30_000, peak_rate=8e-4, warm_up=500, averaging=0.9997, decay=0.6, save_every=2000, report_every=200)
BATCH_SIZE = 256
SCENE_COUNT = 400_000
CHUNK = 2000  # scenes that are made, captioned and encoded at a time
CAPTIONS = 4  # of each scene
OPEN_CAPTIONS = 0.15  # share of captions that leave all places open, besides those that do so by lot: they are harder
TIMESTEP_POWER = 0.6  # what lies where is decided at high noise, and is harder than how it looks: more of that
CAPTION_DROPOUT = 0.1  # so that there is a prediction without caption to be guided away from (arXiv 2207.12598)


class TextToLatents(nn.Module):
    """The two parts that are trained together."""

    def __init__(self, unet: UNet, text_encoder: CLIPTextEncoder) -> None:
        super().__init__()
        self.unet = unet
        self.clip_text_encoder = text_encoder

    def forward(self, latents: Tensor, timesteps: Tensor, token_ids: Tensor) -> Tensor:
        """Velocities (B, 4, 8, 8) of noisy latents (B, 4, 8, 8) at timesteps (B,), of captions' token ids (B, L)."""
        self.unet.set_timestep(timesteps)
        self.unet.set_clip_text_embedding(self.clip_text_encoder(token_ids))
        return self.unet(latents)


@dataclass(frozen=True)
class Examples:
    """What is learned from: latents (N, 4, 8, 8), token ids (N, captions, L) and how often each comes up (N,).

    no_caption: the token ids (L,) of the empty caption.
    """

    latents: Tensor
    token_ids: Tensor
    chances: Tensor
    no_caption: Tensor

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents (count, 4, 8, 8) and the token ids (count, L) of one of the captions of each, or of none."""
        device = self.latents.device
        rows = torch.multinomial(self.chances, count, replacement=True, generator=generator)
        which = torch.randint(self.token_ids.shape[1], (count,), generator=generator, device=device)
        is_left_out = torch.rand(count, generator=generator, device=device) < CAPTION_DROPOUT
        token_ids = self.token_ids[rows, which].where(~is_left_out[:, None], self.no_caption)
        return self.latents[rows].float(), token_ids.long()


def new_unet() -> UNet:
    """The UNet as it begins."""
    torch.manual_seed(5)
    unet = UNet(EMBEDDED_UNET)
    begin_silent(unet)
    return unet


def train_diffusion(
    unet: UNet,
    lda: LatentDiffusionAutoencoder,
    text_encoder: CLIPTextEncoder,
    folder: Path,
    plan: Plan = PLAN,
    device: torch.device | str = "cpu",
) -> TextToLatents:
    """Train the UNet and the text encoder in `folder`, where the examples are kept too."""
    examples = cached_examples(lda.to(device), folder / "examples.safetensors", SCENE_COUNT)
    model = TextToLatents(unet, text_encoder).to(device)
    powers = torch.tensor(signal_powers(EMBEDDED_SOLVER_PARAMS), dtype=torch.float32, device=device)
    if torch.device(device).type == "cuda":
        record(model, examples)

    def loss_of(generator: torch.Generator) -> Tensor:
        return velocity_loss(model, *examples.draw(BATCH_SIZE, generator), powers, generator)

    train("diffusion", model, plan, loss_of, folder, reporter(folder))
    return model.cpu()


def record(model: TextToLatents, examples: Examples) -> None:
    """Have the model run and differentiate as two CUDA graphs: launching its small kernels one by one takes longer."""
    torch.set_float32_matmul_precision("high")
    latents, token_ids = examples.draw(BATCH_SIZE, torch.Generator(examples.latents.device))
    torch.cuda.make_graphed_callables(model, (latents, torch.zeros_like(token_ids[:, 0]), token_ids))


def begin_silent(unet: UNet) -> None:
    """Have each residual block and each transformer begin as its shortcut, and the prediction as 0."""
    ends: list[nn.Module] = [*unet.layers(OutputBlock)]
    ends += [block.layer("Chain", fl.Chain) for block in unet.layers(ResidualBlock)]
    ends += [*unet.layers(SpatialTransformer)]
    for end in ends:
        last = [layer for layer in end.modules() if isinstance(layer, fl.Conv2d)][-1]
        nn.init.zeros_(last.weight)


def cached_examples(lda: LatentDiffusionAutoencoder, path: Path, count: int) -> Examples:
    """Scenes drawn for training and encoded, with captions; on the device of the autoencoder.

    Read from `path` if they are there and of the same autoencoder, else written there.
    """
    recipe = {"count": str(count), "captions": str(CAPTIONS), "autoencoder": _digest(lda)}
    device = next(lda.parameters()).device
    if path.exists():
        tensors, metadata = read_with_metadata(path, device)
        if metadata == recipe:
            return Examples(**tensors)
    examples = _make_examples(lda, count)
    write_safetensors(path, vars(examples), metadata=recipe)
    return examples


@torch.no_grad()
def _make_examples(lda: LatentDiffusionAutoencoder, count: int) -> Examples:
    """Captions are written by all cores, while this process draws and encodes."""
    device, parts = next(lda.parameters()).device, list[tuple[Tensor, Tensor, Tensor]]()
    sizes = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for number, (scenes, token_ids) in enumerate(pool.map(_make_captioned, sizes, range(len(sizes)))):
            images = draw_scenes(scenes, torch.Generator().manual_seed(number))
            latents = lda.encode(images.to(device)).half()
            parts.append((latents, token_ids.to(device), scenes.is_there.sum(1).float().to(device)))
    joined = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    return Examples(*joined, no_caption=_tokenizer()("")[0].short().to(device))


def _make_captioned(count: int, number: int) -> tuple[Scenes, Tensor]:
    """Scenes, and token ids (count, CAPTIONS, L) of captions of them."""
    torch.set_num_threads(1)
    scenes, chance = make_scenes(count, torch.Generator().manual_seed(number), Split.TRAIN), Random(number)
    texts: list[str] = []
    for scene in scenes.to_list():
        for _ in range(CAPTIONS):
            write = caption_without_places if chance.random() < OPEN_CAPTIONS else caption_of
            texts.append(write(scene, chance))
    return scenes, _tokenizer()(texts).short().unflatten(0, (count, CAPTIONS))


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(EMBEDDED_VOCABULARY, sequence_length=EMBEDDED_TEXT_ENCODER.max_sequence_length)


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def velocity_loss(
    model: nn.Module, latents: Tensor, token_ids: Tensor, powers: Tensor, generator: torch.Generator
) -> Tensor:
    """Squared error of the velocity, at timesteps spread over the batch, denser where it is noisy.

    powers: ᾱ of each timestep.
    """
    count, device = len(latents), latents.device
    spread = (torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)) / count
    timesteps = (spread**TIMESTEP_POWER * len(powers)).long().clamp(max=len(powers) - 1)
    power = powers[timesteps, None, None, None]
    noise = torch.randn(latents.shape, generator=generator, device=device)
    noisy = power.sqrt() * latents + (1 - power).sqrt() * noise
    velocity = power.sqrt() * noise - (1 - power).sqrt() * latents
    return (model(noisy, timesteps, token_ids) - velocity).square().mean()
