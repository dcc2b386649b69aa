"""A small Stable Diffusion at random, non-trivial weights, in folders and files that tests share."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from refiners.foundationals.clip import CLIPTextSpec
from refiners.foundationals.latent_diffusion import (
    AutoencoderSpec,
    StableDiffusion_1,
    StableDiffusion_1_Inpainting,
    StableDiffusionSpec,
    UNetSpec,
)

SMALL = StableDiffusionSpec(
    unet=UNetSpec(channels=(32, 64), transformer_layers=(1, 0), num_heads=(2, 4), text_dim=32, norm_groups=8),
    autoencoder=AutoencoderSpec(channels=(16, 16, 32, 32), blocks_per_level=1, norm_groups=8),
    text_encoder=CLIPTextSpec(
        embedding_dim=32, num_layers=2, num_attention_heads=2, feedforward_dim=64, use_quick_gelu=True
    ),
    default_size=64,
)


def randomize(module: nn.Module) -> None:
    """Weights of a size that keeps activations and pictures in range, nothing at zero or one."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.7 / parameter[0].numel() ** 0.5)
        else:
            nn.init.normal_(parameter, mean=0.8 if name.endswith("weight") else 0.0, std=0.1)


def small_model(cls: type[StableDiffusion_1] = StableDiffusion_1, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = cls(spec=small_spec(cls), **changes)
    randomize(model)
    return model


def small_spec(cls: type[StableDiffusion_1] = StableDiffusion_1) -> StableDiffusionSpec:
    channels = 9 if cls is StableDiffusion_1_Inpainting else 4
    return replace(SMALL, unet=replace(SMALL.unet, in_channels=channels))


def small_folder(path: Path, cls: type[StableDiffusion_1] = StableDiffusion_1) -> Path:
    small_model(cls).save_pretrained(path)
    return path


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def psnr(ours: list[Any], theirs: Tensor) -> float:
    """Of PIL pictures against floats in [0, 1], (B, H, W, 3)."""
    mine = torch.from_numpy(np.stack([np.asarray(image) for image in ours])).double() / 255
    error = (mine - (theirs.double() * 255).round() / 255).square().mean()
    return float(10 * torch.log10(1 / error.clamp(min=1e-12)))
