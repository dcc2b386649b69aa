"""Edits that steer sampling without weights of their own, on any latent diffusion model."""

from refiners.foundationals.latent_diffusion.steering.free_u import FreeUAdapter
from refiners.foundationals.latent_diffusion.steering.perturbed_attention import PerturbedAttentionGuidance
from refiners.foundationals.latent_diffusion.steering.reference_only import ReferenceOnlyControlAdapter
from refiners.foundationals.latent_diffusion.steering.self_attention_guidance import SelfAttentionGuidance
from refiners.foundationals.latent_diffusion.steering.steering import Steering
from refiners.foundationals.latent_diffusion.steering.style_aligned import StyleAlignedAdapter

__all__ = [
    "FreeUAdapter",
    "PerturbedAttentionGuidance",
    "ReferenceOnlyControlAdapter",
    "SelfAttentionGuidance",
    "Steering",
    "StyleAlignedAdapter",
]
