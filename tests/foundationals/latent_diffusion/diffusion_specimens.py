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
    StableDiffusion,
    StableDiffusion_1,
    StableDiffusion_1_Inpainting,
    StableDiffusion_XL,
    StableDiffusion_XL_Inpainting,
    StableDiffusion_XL_Refiner,
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

SMALL_XL = StableDiffusionSpec(
    unet=UNetSpec(
        channels=(32, 64),
        transformer_layers=(0, 2),
        num_heads=(2, 4),
        text_dim=24 + 32,
        norm_groups=8,
        has_linear_projection=True,
        pooled_text_dim=20,
        num_time_ids=6,
        time_id_waves=8,
    ),
    autoencoder=replace(SMALL.autoencoder, latent_scale=0.13025, needs_float32=True),
    text_encoder=CLIPTextSpec(
        embedding_dim=24, num_layers=3, num_attention_heads=2, feedforward_dim=64, use_quick_gelu=True, skipped_layers=1
    ),
    text_encoder_2=CLIPTextSpec(
        embedding_dim=32,
        num_layers=3,
        num_attention_heads=4,
        feedforward_dim=64,
        pad_token_id=0,
        skipped_layers=1,
        projection_dim=20,
    ),
    default_size=64,
    condition_scale=5.0,
)
SMALL_REFINER = replace(
    SMALL_XL,
    unet=replace(SMALL_XL.unet, text_dim=32, pooled_text_dim=32, num_time_ids=5),
    text_encoder=None,
    text_encoder_2=replace(SMALL_XL.text_encoder_2, projection_dim=32),
)
SPECS: dict[type[Any], StableDiffusionSpec] = {
    StableDiffusion_1: SMALL,
    StableDiffusion_1_Inpainting: replace(SMALL, unet=replace(SMALL.unet, in_channels=9)),
    StableDiffusion_XL: SMALL_XL,
    StableDiffusion_XL_Inpainting: replace(SMALL_XL, unet=replace(SMALL_XL.unet, in_channels=9)),
    StableDiffusion_XL_Refiner: SMALL_REFINER,
}


def randomize(module: nn.Module) -> None:
    """Weights of a size that keeps activations and pictures in range, nothing at zero or one."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.7 / parameter[0].numel() ** 0.5)
        else:
            nn.init.normal_(parameter, mean=0.8 if name.endswith("weight") else 0.0, std=0.1)


def small_model(cls: type[StableDiffusion] = StableDiffusion_1, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = cls(spec=SPECS[cls], **changes)
    randomize(model)
    return model


def small_folder(path: Path, cls: type[StableDiffusion] = StableDiffusion_1) -> Path:
    small_model(cls).save_pretrained(path)
    return path


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def psnr(ours: list[Any], theirs: Tensor) -> float:
    """Of PIL pictures against floats in [0, 1], (B, H, W, 3)."""
    mine = torch.from_numpy(np.stack([np.asarray(image) for image in ours])).double() / 255
    error = (mine - (theirs.double() * 255).round() / 255).square().mean()
    return float(10 * torch.log10(1 / error.clamp(min=1e-12)))
