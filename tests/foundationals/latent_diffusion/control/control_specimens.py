"""Small UNets and ControlNets of ours and of diffusers with the same random, non-trivial weights."""

from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from refiners.foundationals.latent_diffusion import UNet, UNetSpec, unet_names
from refiners.foundationals.latent_diffusion.control import ControlNet, ControlNetSpec, control_net_names

SD1 = UNetSpec((16, 32, 32), (1, 1, 0), (2, 2, 4), text_dim=16, norm_groups=8)
SDXL = UNetSpec(
    (16, 32, 48),
    (0, 1, 2),
    (2, 2, 4),
    text_dim=16,
    norm_groups=8,
    has_linear_projection=True,
    pooled_text_dim=10,
    num_time_ids=6,
    time_id_waves=8,
)
SPECS = {"SD1": SD1, "SDXL": SDXL}
TINY = UNetSpec((16, 32), (1, 0), (2, 4), blocks_per_level=1, text_dim=16, norm_groups=8)  # for what is not compared
CHANNELS = (8, 12, 16)  # of the encoder of the condition: a picture has 4 times the sides of the latents


def way_down(spec: UNetSpec) -> dict[str, Any]:
    """The options that diffusers' UNets and ControlNets share."""
    return {
        "in_channels": spec.in_channels,
        "block_out_channels": spec.channels,
        "layers_per_block": spec.blocks_per_level,
        "down_block_types": tuple("CrossAttnDownBlock2D" if count else "DownBlock2D" for count in levels(spec)),
        "transformer_layers_per_block": (*(max(count, 1) for count in levels(spec)[:-1]), spec.num_middle_layers or 1),
        "attention_head_dim": spec.num_heads,
        "cross_attention_dim": spec.text_dim,
        "norm_num_groups": spec.norm_groups,
        "use_linear_projection": spec.has_linear_projection,
        "addition_embed_type": "text_time" if spec.pooled_text_dim else None,
        "addition_time_embed_dim": spec.time_id_waves,
        "projection_class_embeddings_input_dim": spec.pooled_text_dim + spec.num_time_ids * spec.time_id_waves,
    }


def levels(spec: UNetSpec) -> tuple[int, ...]:
    return spec.transformer_layers


def their_unet(spec: UNetSpec) -> Any:
    up = tuple("CrossAttnUpBlock2D" if count else "UpBlock2D" for count in reversed(levels(spec)))
    return UNet2DConditionModel(out_channels=spec.out_channels, up_block_types=up, **way_down(spec))


def their_control_net(spec: UNetSpec, channels: tuple[int, ...] = CHANNELS, **options: Any) -> Any:
    middle = "UNetMidBlock2DCrossAttn" if spec.num_middle_layers else "UNetMidBlock2D"
    return ControlNetModel(
        conditioning_embedding_out_channels=channels, mid_block_type=middle, **way_down(spec), **options
    )


def randomize(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.is_meta:
            continue
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05, generator=generator)
        else:
            nn.init.normal_(parameter, mean=0.5, std=0.2, generator=generator)


def unet_pair(spec: UNetSpec) -> tuple[UNet, Any]:
    theirs, ours, names = their_unet(spec), UNet(spec), unet_names.diffusers_names(spec)
    randomize(theirs)
    ours.load_state_dict({str(names.to_ours(key)): tensor for key, tensor in theirs.state_dict().items()})
    return ours, theirs


def control_pair(spec: UNetSpec, seed: int = 1, **options: Any) -> tuple[ControlNet, Any]:
    theirs = their_control_net(spec, **options)
    randomize(theirs, seed)
    own = ControlNetSpec(spec, CHANNELS, averages=options.get("global_pool_conditions", False))
    ours, names = ControlNet(own), control_net_names.diffusers_names(own)
    ours.load_state_dict({str(names.to_ours(key)): tensor for key, tensor in theirs.state_dict().items()})
    return ours, theirs


Inputs = tuple[Tensor, Tensor, dict[str, Tensor], Tensor]


def inputs(spec: UNetSpec, height: int = 8, width: int = 12, batch: int = 2) -> Inputs:
    """Latents, time steps, all that the UNet reads besides, and a condition for each."""
    torch.manual_seed(0)
    conditions = {
        "clip_text_embedding": torch.randn(batch, 7, spec.text_dim),
        "pooled_text_embedding": torch.randn(batch, spec.pooled_text_dim),
        "time_ids": torch.randint(0, 1024, (batch, spec.num_time_ids)).float(),
    }
    latents, timestep = torch.randn(batch, spec.in_channels, height, width), torch.randint(0, 1000, (batch,))
    picture = torch.rand(batch, 3, 4 * height, 4 * width)
    return latents, timestep, {name: conditions[name] for name in spec.conditions}, picture


def predict(unet: UNet, latents: Tensor, timestep: Tensor, conditions: dict[str, Tensor], *_: Tensor) -> Tensor:
    unet.set_timestep(timestep)
    unet.set_conditions(conditions)
    return unet(latents)


def their_arguments(conditions: dict[str, Tensor]) -> dict[str, Any]:
    added: dict[str, Any] = {}
    if "time_ids" in conditions:
        added = {"text_embeds": conditions["pooled_text_embedding"], "time_ids": conditions["time_ids"]}
    return {"encoder_hidden_states": conditions["clip_text_embedding"], "added_cond_kwargs": added}


def predict_theirs(
    unet: Any,
    control_nets: list[tuple[Any, float]],
    latents: Tensor,
    timestep: Tensor,
    conditions: dict[str, Tensor],
    picture: Tensor,
    **options: Any,
) -> Tensor:
    """With the sum of what the ControlNets add, each at its scale."""
    arguments = their_arguments(conditions)
    total: list[Tensor] = []
    for control_net, scale in control_nets:
        down, middle = control_net(
            latents,
            timestep,
            controlnet_cond=picture,
            conditioning_scale=scale,
            return_dict=False,
            **arguments,
            **options,
        )
        total = [a + b for a, b in zip(total, (*down, middle), strict=True)] if total else [*down, middle]
    return unet(
        latents,
        timestep,
        down_block_additional_residuals=total[:-1],
        mid_block_additional_residual=total[-1],
        **arguments,
    ).sample


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()
