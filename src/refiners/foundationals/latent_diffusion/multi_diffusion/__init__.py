"""Pictures larger than those a model was trained on, and prompts for parts of them."""

from refiners.foundationals.latent_diffusion.multi_diffusion.multi_diffusion import MultiDiffusion
from refiners.foundationals.latent_diffusion.multi_diffusion.regional_prompts import Region, RegionalPrompts
from refiners.foundationals.latent_diffusion.multi_diffusion.upscale import upscale

__all__ = ["MultiDiffusion", "Region", "RegionalPrompts", "upscale"]
