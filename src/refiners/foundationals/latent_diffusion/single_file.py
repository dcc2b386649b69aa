"""Stable Diffusion in one file with the original names, as on Civitai: `model.diffusion_model.…` and the like."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from refiners.foundationals.clip.names import SINGLE_FILE_PREFIX, text_encoder_names
from refiners.foundationals.latent_diffusion import autoencoder_names, unet_names
from refiners.foundationals.latent_diffusion.specs import StableDiffusionSpec
from refiners.weights.files import read_safetensors, write_safetensors
from refiners.weights.formats import identify
from refiners.weights.matching import Shapes, match_all
from refiners.weights.rules import Names
from refiners.weights.torch_files import read_torch

UNET, AUTOENCODER, TEXT_ENCODER = "model.diffusion_model", "first_stage_model", "cond_stage_model"
FIRST_CONVOLUTION = f"{UNET}.input_blocks.0.0.weight"
# What training left in the files, and generation does not need: the schedule, averages of weights, losses.
LEFTOVERS = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("model_ema", "first_stage_model.loss", "cond_stage_model.logit_scale", "lvlb_weights"),
    *("cond_stage_model.transformer.logit_scale", "scale_factor"),
)
# Attention of the autoencoder: convolutions of size 1 in these files, linear layers with us.
POINTWISE_CONVOLUTIONS = (".attn_1.q.weight", ".attn_1.k.weight", ".attn_1.v.weight", ".attn_1.proj_out.weight")


def names(spec: StableDiffusionSpec) -> Names:
    """Ours, with `unet`, `lda` and `clip_text_encoder` in front, to the original ones."""
    return Names(
        {
            "unet": (UNET, unet_names.single_file_names(spec.unet)),
            "lda": (AUTOENCODER, autoencoder_names.single_file_names(spec.autoencoder)),
            "clip_text_encoder": ("", text_encoder_names(spec.text_encoder, SINGLE_FILE_PREFIX)),
        },
        dropped=LEFTOVERS,
    )


class SingleFile:
    """A file to load a model from. Raises ValueError, FileNotFoundError if it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)

    def spec(self, default: StableDiffusionSpec) -> StableDiffusionSpec:
        """The default sizes, with as many input channels as the file's UNet has."""
        first = self.tensors.get(FIRST_CONVOLUTION)
        if first is None or first.ndim != 4:
            return default
        return replace(default, unet=replace(default.unet, in_channels=first.shape[1]))

    def read(self, spec: StableDiffusionSpec, shapes: Shapes) -> dict[str, Tensor]:
        """All tensors, by our names. Raises ValueError if they are not those of the model."""
        parts = {UNET: "UNet", AUTOENCODER: "autoencoder", TEXT_ENCODER: "text encoder"}
        lost = [what for part, what in parts.items() if not any(name.startswith(f"{part}.") for name in self.tensors)]
        if lost:
            identity = identify({name: tuple(tensor.shape) for name, tensor in self.tensors.items()})
            raise ValueError(
                f"{self.path}: no whole Stable Diffusion 1, as there is no {', no '.join(lost)} in it, but {identity}; "
                "give another file, or load it as what it is"
            )
        return match_all(self.tensors, names(spec), shapes, str(self.path))


def write(path: Path, spec: StableDiffusionSpec, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Write tensors with our names as a single file."""
    to_theirs = names(spec).to_theirs
    renamed = {str(to_theirs(ours)): tensor.to(dtype or tensor.dtype) for ours, tensor in tensors.items()}
    original = {
        name: tensor[..., None, None] if name.endswith(POINTWISE_CONVOLUTIONS) else tensor
        for name, tensor in renamed.items()
    }
    write_safetensors(path, original, metadata={"format": "pt"})
