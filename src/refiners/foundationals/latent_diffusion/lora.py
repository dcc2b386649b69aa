"""LoRA files of every format on a diffusion model: put on, taken off, looked into, written and converted.

lora_weights = LoraWeights("pokemon_lora.safetensors", device=sd15.device)
print(lora_weights.patch(sd15, scale=1.0))
lora_weights.eject()
"""

from refiners.foundationals.latent_diffusion.lora_export import convert_lora, export_lora, save_lora
from refiners.foundationals.latent_diffusion.lora_inspection import LoraInspection, inspect_lora
from refiners.foundationals.latent_diffusion.lora_report import AttachedUpdate, LoraReport
from refiners.foundationals.latent_diffusion.lora_weights import LoraWeights

__all__ = [
    "AttachedUpdate",
    "LoraInspection",
    "LoraReport",
    "LoraWeights",
    "convert_lora",
    "export_lora",
    "inspect_lora",
    "save_lora",
]
