"""What leads a UNet besides its text, at half of Stable Diffusion 1.5's widths, against diffusers."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from bench.diffusion import compare, share
from bench.timing import Row
from refiners.foundationals.latent_diffusion import UNet, unet_names
from refiners.foundationals.latent_diffusion.control import (
    ControlNet,
    ControlNetAdapter,
    ControlNetSpec,
    T2IAdapter,
    control_net_names,
)
from refiners.foundationals.latent_diffusion.image_prompt import IPAdapter
from refiners.foundationals.latent_diffusion.unet_spec import SD1_UNET

SPEC = replace(SD1_UNET, channels=(160, 320, 640, 640))
ROUNDS = 9
LATENTS, TIMESTEP, TEXT = (2, 4, 32, 32), torch.tensor([500]), (2, 77, 768)


def unet_pair() -> tuple[UNet, Any]:
    """Ours and theirs with the same tensors."""
    with torch.device("meta"):
        theirs = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, block_out_channels=SPEC.channels)
    ours = UNet(SPEC, device="meta")
    share(theirs, ours, unet_names.diffusers_names(SPEC))
    return ours, theirs


def step(unet: UNet, x: Tensor, text: Tensor) -> Tensor:
    unet.set_timestep(TIMESTEP)
    unet.set_clip_text_embedding(text)
    return unet(x)


def ip_adapter_row() -> Row:
    ours, theirs = unet_pair()
    adapter = IPAdapter(ours).inject()
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in adapter.tensors().items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor.detach()
    theirs._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    image = torch.randn(1, 1024)
    with torch.no_grad():
        adapter.set_clip_image_embedding(adapter.embed_features(image))
    x, text = torch.randn(LATENTS), torch.randn(TEXT)
    embeddings = {"image_embeds": [torch.stack([torch.zeros_like(image), image])]}
    return compare(
        "step with an IP-Adapter",
        lambda: step(ours, x, text),
        lambda: theirs(x, TIMESTEP, text, added_cond_kwargs=embeddings).sample,
        ROUNDS,
    )


def control_net_row() -> Row:
    """Of a later step: the first one works out the features of the condition, which the peer does at every step."""
    ours, theirs = unet_pair()
    with torch.device("meta"):
        peer = ControlNetModel(cross_attention_dim=768, attention_head_dim=8, block_out_channels=SPEC.channels)
    control_net = ControlNet(ControlNetSpec(SPEC), device="meta")
    share(peer, control_net, control_net_names.diffusers_names(control_net.spec))
    adapter = ControlNetAdapter(ours, control_net).inject()
    x, text, condition = torch.randn(LATENTS), torch.randn(TEXT), torch.rand(1, 3, 8 * LATENTS[2], 8 * LATENTS[3])
    adapter.set_controlnet_condition(condition)
    with torch.no_grad():
        adapter.before_step(0, 1)

    def peer_step() -> Tensor:
        down, middle = peer(x, TIMESTEP, text, controlnet_cond=condition.expand(2, -1, -1, -1), return_dict=False)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return theirs(x, TIMESTEP, text, **added).sample

    return compare("step with a ControlNet", lambda: step(ours, x, text), peer_step, ROUNDS)


def t2i_adapter_row() -> Row:
    ours, theirs = unet_pair()
    adapter = T2IAdapter(ours).inject()
    side = LATENTS[2]
    features = [torch.randn(1, place.width, side // place.scale, side // place.scale) for place in adapter.places]
    adapter.set_condition_features(features)
    x, text = torch.randn(LATENTS), torch.randn(TEXT)

    def peer_step() -> Tensor:
        added = [feature.expand(2, -1, -1, -1) for feature in features]
        return theirs(x, TIMESTEP, text, down_intrablock_additional_residuals=added).sample

    return compare("step with a T2I-Adapter", lambda: step(ours, x, text), peer_step, ROUNDS)


def rows() -> Iterator[Row]:
    for part in (ip_adapter_row, control_net_row, t2i_adapter_row):
        yield part()
