"""What a training step with LoKr, DoRA or LoHa takes over one with LoRA, of all attention layers of a UNet; and peft's.

The UNet has Stable Diffusion 1's shape at half its width. All eight models share its tensors.
"""

import statistics
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional

from bench.diffusion import share
from bench.timing import Row, times
from bench.training import step_of
from refiners.adapters import DeltaAdapter, LinearLora
from refiners.adapters.dora import Dora
from refiners.adapters.loha import Loha
from refiners.adapters.lokr import Lokr
from refiners.foundationals.latent_diffusion import SD1, UNet, unet_names
from refiners.training.targets import find_targets

RANK, BATCH, SIZE, ROUNDS = 8, 2, 32, 9
UNET = replace(SD1.unet, channels=(160, 320, 640, 640), num_heads=(4, 4, 4, 4))
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
BOUNDS = {"LoKr": 1.2, "DoRA": 1.2, "LoHa": 1.5}


def new_lora(layer: nn.Linear, name: str, rank: int) -> LinearLora:
    return LinearLora(name, layer.in_features, layer.out_features, rank)


OURS: dict[str, Callable[..., Any]] = {
    "LoRA": new_lora,
    "LoKr": Lokr.for_layer,
    "DoRA": Dora.for_layer,
    "LoHa": Loha.for_layer,
}
PEFT: dict[str, Any] = {
    "LoRA": LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS),
    "LoKr": LoKrConfig(r=RANK, alpha=RANK, target_modules=TARGETS),
    "DoRA": LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, use_dora=True),
    "LoHa": LoHaConfig(r=RANK, alpha=RANK, target_modules=TARGETS),
}


def trained(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[], object]:
    """A training step of what takes gradients in the model."""
    x, noise = torch.randn(2, BATCH, 4, SIZE, SIZE)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return step_of(parameters, lambda: functional.mse_loss(forward(x), noise))


def ours(base: UNet, kind: str) -> Callable[[], object]:
    unet, text, timestep = base.structural_copy().train(), torch.randn(BATCH, 77, UNET.text_dim), torch.tensor([500])
    for layer, parent in find_targets(unet, ["Attention", "SelfAttention"]):
        DeltaAdapter(layer, OURS[kind](layer, kind, rank=RANK)).inject(parent)

    def forward(x: Tensor) -> Tensor:
        unet.set_timestep(timestep)
        unet.set_clip_text_embedding(text)
        return unet(x)

    return trained(unet, forward)


def new_peer() -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=UNET.channels,
            cross_attention_dim=UNET.text_dim,
            attention_head_dim=UNET.num_heads[0],
            norm_num_groups=UNET.norm_groups,
        )


def peers(base: Any, kind: str) -> Callable[[], object]:
    unet, text, timestep = new_peer(), torch.randn(BATCH, 77, UNET.text_dim), torch.tensor([500])
    unet.load_state_dict(base.state_dict(), assign=True)
    unet.requires_grad_(False).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(PEFT[kind], unet)
    return trained(unet, lambda x: unet(x, timestep, text).sample)


def rows() -> list[Row]:
    base, peer = UNet(UNET, device="meta"), new_peer()
    share(peer, base, unet_names.diffusers_names(UNET))
    base.requires_grad_(False)
    steps = {f"ours {kind}": ours(base, kind) for kind in OURS} | {f"peft {kind}": peers(peer, kind) for kind in PEFT}
    taken = times(steps, ROUNDS, round_s=0.0)

    def ratio(side: str, kind: str) -> float:
        pairs = zip(taken[f"{side} {kind}"], taken[f"{side} LoRA"], strict=True)
        return statistics.median(time / plain for time, plain in pairs)

    return [
        Row(
            f"training step with {kind} over LoRA",
            ratio("ours", kind),
            ratio("peft", kind),
            "x",
            bound,
            ratio("ours", kind),
        )
        for kind, bound in BOUNDS.items()
    ]
