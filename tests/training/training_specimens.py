"""Small models, pictures and configs that the tests of training share."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.foundationals.clip import CLIPTextSpec
from refiners.foundationals.latent_diffusion import (
    AutoencoderSpec,
    StableDiffusion_1,
    StableDiffusionSpec,
    UNetSpec,
)
from refiners.training import Callback, Trainer, TrainerConfig

SMALL = StableDiffusionSpec(
    unet=UNetSpec(
        channels=(16, 32),
        transformer_layers=(1, 0),
        num_heads=(2, 2),
        blocks_per_level=1,
        text_dim=16,
        norm_groups=4,
    ),
    autoencoder=AutoencoderSpec(channels=(8, 8, 8), blocks_per_level=1, norm_groups=4),
    text_encoder=CLIPTextSpec(embedding_dim=16, num_layers=1, num_attention_heads=2, feedforward_dim=32),
    default_size=32,
)
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")


def randomize(module: nn.Module) -> None:
    """Weights of a size that keeps activations in range, nothing at zero or one."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.7 / parameter[0].numel() ** 0.5)
        else:
            nn.init.normal_(parameter, mean=0.8 if name.endswith("weight") else 0.0, std=0.1)


def small_model(seed: int = 0) -> StableDiffusion_1:
    torch.manual_seed(seed)
    model = StableDiffusion_1(spec=SMALL)
    randomize(model)
    return model


def write_pictures(folder: Path, count: int = 6, size: tuple[int, int] = (32, 32)) -> Path:
    """Discs in colours, with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        colour = COLOURS[index % len(COLOURS)]
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).ellipse((4 + index, 6, 20 + index, 24), fill=colour)
        image.save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(f"a {colour} disc")
    return folder


class Points:
    """Batches of points and where they should go, each following from its place."""

    def __init__(self, batch_size: int = 4, length: int = 5, width: int = 8) -> None:
        self.batch_size, self.length, self.width = batch_size, length, width

    def __len__(self) -> int:
        return self.length

    def get(self, epoch: int, index: int, rank: int, count: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        x = torch.randn(self.batch_size, self.width, generator=generator)
        share = self.batch_size // count
        x = x[rank * share : (rank + 1) * share]
        return x, x.flip(1)


def small_chain(width: int = 8) -> fl.Chain:
    torch.manual_seed(0)
    return fl.Chain(fl.Linear(width, 16), fl.SiLU(), nn.Dropout(0.1), fl.Linear(16, width))


def config(folder: Path, **sections: Any) -> TrainerConfig:
    """A config that trains quietly for 10 steps; sections add to it or override."""
    table: dict[str, Any] = {
        "training": {"duration": "10:step", "batch_size": 4, **sections.pop("training", {})},
        "optimizer": {"learning_rate": 0.01, **sections.pop("optimizer", {})},
        "checkpointing": {"save_folder": folder, **sections.pop("checkpointing", {})},
        "logging": {"tensorboard": False, "progress": False},
        **sections,
    }
    return TrainerConfig.read(table)


class Losses(Callback):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_step_end(self, trainer: Trainer) -> None:
        self.values.append(trainer.metrics["loss"])


def make_trainer(folder: Path, chain: fl.Chain | None = None, **sections: Any) -> tuple[Trainer, Losses]:
    """A trainer of a small chain on points, and the losses it will have."""
    model, losses = chain or small_chain(), Losses()

    def compute_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    return Trainer({"model": model}, compute_loss, Points(), config(folder, **sections), callbacks=[losses]), losses
