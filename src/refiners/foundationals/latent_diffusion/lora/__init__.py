"""LoRA files of every format on a diffusion model: put on, taken off, looked into, written and converted.

lora_weights = LoraWeights("pokemon_lora.safetensors", device=sd15.device)
print(lora_weights.patch(sd15, scale=1.0))
lora_weights.eject()
"""

from refiners.foundationals.latent_diffusion.lora.algebra import combine_loras, extract_lora, resize_lora, to_lora
from refiners.foundationals.latent_diffusion.lora.comparison import LoraComparison, compare_loras
from refiners.foundationals.latent_diffusion.lora.export import convert_lora, export_lora, save_lora
from refiners.foundationals.latent_diffusion.lora.inspection import LoraInspection, inspect_lora
from refiners.foundationals.latent_diffusion.lora.losses import LayerLoss, LoraLosses
from refiners.foundationals.latent_diffusion.lora.report import AttachedUpdate, LoraReport
from refiners.foundationals.latent_diffusion.lora.weights import LoraWeights

__all__ = [
    "AttachedUpdate",
    "LayerLoss",
    "LoraComparison",
    "LoraInspection",
    "LoraLosses",
    "LoraReport",
    "LoraWeights",
    "combine_loras",
    "compare_loras",
    "convert_lora",
    "export_lora",
    "extract_lora",
    "inspect_lora",
    "resize_lora",
    "save_lora",
    "to_lora",
]
