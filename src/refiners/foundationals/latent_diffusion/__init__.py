"""Latent diffusion: Stable Diffusion and its kin."""

from refiners.foundationals.latent_diffusion.autoencoder import AutoencoderSpec, LatentDiffusionAutoencoder
from refiners.foundationals.latent_diffusion.generation import GenerationCancelled, StepReport
from refiners.foundationals.latent_diffusion.specs import (
    SD1,
    SD1_INPAINTING,
    SDXL,
    SDXL_INPAINTING,
    SDXL_REFINER,
    StableDiffusionSpec,
)
from refiners.foundationals.latent_diffusion.stable_diffusion import StableDiffusion
from refiners.foundationals.latent_diffusion.stable_diffusion_1 import StableDiffusion_1, StableDiffusion_1_Inpainting
from refiners.foundationals.latent_diffusion.stable_diffusion_xl import (
    StableDiffusion_XL,
    StableDiffusion_XL_Inpainting,
    StableDiffusion_XL_Refiner,
)
from refiners.foundationals.latent_diffusion.unet import UNet
from refiners.foundationals.latent_diffusion.unet_spec import UNetSpec

__all__ = [
    "SD1",
    "SD1_INPAINTING",
    "SDXL",
    "SDXL_INPAINTING",
    "SDXL_REFINER",
    "AutoencoderSpec",
    "GenerationCancelled",
    "LatentDiffusionAutoencoder",
    "StableDiffusion",
    "StableDiffusionSpec",
    "StableDiffusion_1",
    "StableDiffusion_1_Inpainting",
    "StableDiffusion_XL",
    "StableDiffusion_XL_Inpainting",
    "StableDiffusion_XL_Refiner",
    "StepReport",
    "UNet",
    "UNetSpec",
]
