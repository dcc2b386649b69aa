"""Latent diffusion: Stable Diffusion and its kin."""

from refiners.foundationals.latent_diffusion.autoencoder import AutoencoderSpec, LatentDiffusionAutoencoder
from refiners.foundationals.latent_diffusion.unet import UNet, UNetSpec

__all__ = ["AutoencoderSpec", "LatentDiffusionAutoencoder", "UNet", "UNetSpec"]
