"""Pictures as prompts."""

from refiners.foundationals.latent_diffusion.image_prompt.ip_adapter import IPAdapter
from refiners.foundationals.latent_diffusion.image_prompt.projection import (
    FullImageProjection,
    ImageProjection,
    PerceiverResampler,
    ResamplerSpec,
)

__all__ = ["FullImageProjection", "IPAdapter", "ImageProjection", "PerceiverResampler", "ResamplerSpec"]
