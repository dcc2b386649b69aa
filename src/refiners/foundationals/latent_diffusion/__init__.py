"""Latent diffusion: Stable Diffusion and its kin."""

from refiners.foundationals.latent_diffusion.autoencoder import AutoencoderSpec, LatentDiffusionAutoencoder
from refiners.foundationals.latent_diffusion.generation import GenerationCancelled, StepReport
from refiners.foundationals.latent_diffusion.specs import SD1, SD1_INPAINTING, StableDiffusionSpec
from refiners.foundationals.latent_diffusion.stable_diffusion_1 import StableDiffusion_1, StableDiffusion_1_Inpainting
from refiners.foundationals.latent_diffusion.unet import UNet, UNetSpec

__all__ = [
    "SD1",
    "SD1_INPAINTING",
    "AutoencoderSpec",
    "GenerationCancelled",
    "LatentDiffusionAutoencoder",
    "StableDiffusionSpec",
    "StableDiffusion_1",
    "StableDiffusion_1_Inpainting",
    "StepReport",
    "UNet",
    "UNetSpec",
]
