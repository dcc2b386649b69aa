"""Stable Diffusion in one file with the original names, as on Civitai: `model.diffusion_model.…` and the like."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from refiners.foundationals.clip.names import SINGLE_FILE_PREFIX, XL_SINGLE_FILE_PREFIX, text_encoder_names
from refiners.foundationals.clip.open_clip import open_clip_names, rejoined, separated
from refiners.foundationals.latent_diffusion import autoencoder_names, unet_names
from refiners.foundationals.latent_diffusion.specs import StableDiffusionSpec
from refiners.weights.files import read_safetensors, write_safetensors
from refiners.weights.formats import identify
from refiners.weights.matching import Shapes, match_all
from refiners.weights.rules import Names, Target
from refiners.weights.torch_files import read_torch

UNET, AUTOENCODER = "model.diffusion_model", "first_stage_model"
# Where the text encoders of a model with these are. Those of XL with a projection have OpenCLIP's names.
TEXT_ENCODERS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("text_encoder",): ("cond_stage_model",),
    ("text_encoder", "text_encoder_2"): ("conditioner.embedders.0", "conditioner.embedders.1"),
    ("text_encoder_2",): ("conditioner.embedders.0",),
}
# Sizes that differ among models of one kind, and the tensors that tell them as their second dimension.
UNET_SIZES = {
    "in_channels": f"{UNET}.input_blocks.0.0.weight",
    "guidance_waves": f"{UNET}.time_embed.cond_proj.weight",
}
# What training left in the files, and generation does not need: the schedule, averages of weights, losses.
LEFTOVERS = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("model_ema", "first_stage_model.loss", "cond_stage_model.logit_scale", "lvlb_weights"),
    *("cond_stage_model.transformer.logit_scale", "scale_factor", "denoiser.sigmas"),
)
# Attention of the autoencoder: convolutions of size 1 in these files, linear layers with us.
POINTWISE_CONVOLUTIONS = (".attn_1.q.weight", ".attn_1.k.weight", ".attn_1.v.weight", ".attn_1.proj_out.weight")


def names(spec: StableDiffusionSpec) -> Names:
    """Ours, with `unet`, `lda` and `clip_text_encoder` in front, to the original ones, of `separated` tensors."""
    rules: dict[str, Target] = {
        "unet": (UNET, unet_names.single_file_names(spec.unet)),
        "lda": (AUTOENCODER, autoencoder_names.single_file_names(spec.autoencoder)),
    }
    for (name, text), prefix in zip(spec.text_encoders.items(), TEXT_ENCODERS[tuple(spec.text_encoders)], strict=True):
        path = f"clip_text_encoder.{spec.text_encoder_paths[name]}".removesuffix(".")
        if text.projection_dim:
            rules[path] = ("", open_clip_names(text, f"{prefix}.model"))
        else:
            inner = SINGLE_FILE_PREFIX if spec.text_encoder_2 is None else XL_SINGLE_FILE_PREFIX
            rules[path] = ("", text_encoder_names(text, inner))
    return Names(rules, dropped=LEFTOVERS)


class SingleFile:
    """A file to load a model from. Raises ValueError, FileNotFoundError if it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)

    def spec(self, known: Sequence[StableDiffusionSpec]) -> StableDiffusionSpec:
        """The sizes of the first of the known models with such text encoders; if there are none, of the first.

        As many input channels as the file's UNet has, and waves for the scale of guidance.
        """
        told = {
            size: tensor.shape[1]
            for size, name in UNET_SIZES.items()
            if (tensor := self.tensors.get(name)) is not None and tensor.ndim > 1
        }
        encoders = self._text_encoders()
        found = next((each for each in known if tuple(each.text_encoders) == encoders), known[0])
        return replace(found, unet=replace(found.unet, **told))

    def _text_encoders(self) -> tuple[str, ...]:
        """Those that are in the file, by diffusers' names of them."""
        if self._has("conditioner.embedders.1"):
            return ("text_encoder", "text_encoder_2")
        if self._has("conditioner.embedders.0.model"):
            return ("text_encoder_2",)
        return ("text_encoder",) if self._has("cond_stage_model") else ()

    def _has(self, part: str) -> bool:
        return any(name.startswith(f"{part}.") for name in self.tensors)

    def read(self, spec: StableDiffusionSpec, shapes: Shapes) -> dict[str, Tensor]:
        """All tensors, by our names. Raises ValueError if they are not those of the model."""
        encoders = TEXT_ENCODERS[tuple(spec.text_encoders)]
        wanted = {UNET: "UNet", AUTOENCODER: "autoencoder", **dict.fromkeys(encoders, "text encoder")}
        lost = dict.fromkeys(what for part, what in wanted.items() if not self._has(part))
        if lost:
            identity = identify({name: tuple(tensor.shape) for name, tensor in self.tensors.items()})
            raise ValueError(
                f"{self.path}: no whole {spec.family}, as there is no {', no '.join(lost)} in it, but {identity}; "
                "give another file, or load it as what it is"
            )
        return match_all(separated(self.tensors), names(spec), shapes, str(self.path))


def write(path: Path, spec: StableDiffusionSpec, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Write tensors with our names as a single file."""
    to_theirs = names(spec).to_theirs
    renamed = {str(to_theirs(ours)): tensor.to(dtype or tensor.dtype) for ours, tensor in tensors.items()}
    original = {
        name: tensor[..., None, None] if name.endswith(POINTWISE_CONVOLUTIONS) else tensor
        for name, tensor in renamed.items()
    }
    write_safetensors(path, rejoined(original), metadata={"format": "pt"})
