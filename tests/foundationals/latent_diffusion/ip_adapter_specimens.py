"""IP-Adapters at random, non-trivial weights on the small UNets of `test_unet`, here and in diffusers."""

from typing import Any

import torch
from diffusion_specimens import randomize
from test_unet import SPECS, Inputs
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.foundationals.latent_diffusion import UNet, UNetSpec
from refiners.foundationals.latent_diffusion.image_prompt import (
    FullImageProjection,
    ImageProjection,
    IPAdapter,
    PerceiverResampler,
    ResamplerSpec,
)

UNETS = {name: SPECS[name] for name in ("transformer above", "transformers below, linear", "SDXL")}
SD1: UNetSpec = SPECS["transformer above"]
IMAGE_DIM = 20
RESAMPLER = ResamplerSpec(IMAGE_DIM, SD1.text_dim, inner_dim=32, num_tokens=5, num_heads=2, feedforward_dim=128)
KINDS = {
    "plain": lambda: ImageProjection(IMAGE_DIM, SD1.text_dim),
    "plus": lambda: PerceiverResampler(RESAMPLER),
    "full": lambda: FullImageProjection(IMAGE_DIM, SD1.text_dim),
}


def ip_adapter(unet: UNet, kind: str = "plain", seed: int = 1, **options: Any) -> IPAdapter:
    """Not injected yet."""
    torch.manual_seed(seed)
    adapter = IPAdapter(unet, image_proj=KINDS[kind](), **options)
    randomize(adapter.image_proj)
    for attention in adapter.attentions:
        for linear in attention.image_attention.layers(fl.Linear):
            torch.nn.init.normal_(linear.weight, std=2.0)
    return adapter


def features(kind: str, pictures: int = 1, seed: int = 2) -> Tensor:
    """What an image encoder might give."""
    generator = torch.Generator().manual_seed(seed)
    size = (pictures, IMAGE_DIM) if kind == "plain" else (pictures, 7, IMAGE_DIM)
    return torch.randn(size, generator=generator)


def nested(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The form in which diffusers takes the tensors of a file."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor.detach().clone()
    return parts


def give_to_theirs(unet: Any, *adapters: IPAdapter, scales: list[Any] | None = None) -> None:
    """Have diffusers' UNet read pictures as those adapters do; scales: as diffusers takes them, else those of each."""
    unet._load_ip_adapter_weights([nested(adapter.tensors()) for adapter in adapters], low_cpu_mem_usage=False)
    for processor in unet.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = scales or [adapter.scale for adapter in adapters]


def their_prediction(unet: Any, arguments: Inputs, embeddings: list[Tensor], masks: Any = None) -> Tensor:
    """embeddings: of each adapter, (B, pictures, …) from the image encoder."""
    latents, timestep, conditions = arguments
    added: dict[str, Any] = {"image_embeds": embeddings}
    if "time_ids" in conditions:
        added |= {"text_embeds": conditions["pooled_text_embedding"], "time_ids": conditions["time_ids"]}
    text, masked = conditions["clip_text_embedding"], {} if masks is None else {"ip_adapter_masks": masks}
    return unet(latents, timestep, text, added_cond_kwargs=added, cross_attention_kwargs=masked).sample
