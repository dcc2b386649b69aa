"""What tests of steered sampling share: latents after a few steps of ours and of diffusers' pipelines."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusion_specimens import generators, randomize
from torch import Tensor

from refiners.foundationals.latent_diffusion import StableDiffusion, UNet, UNetSpec
from refiners.foundationals.latent_diffusion.unet_names import diffusers_names
from refiners.solvers import DDIM

PROMPTS, NEGATIVES, SEEDS, STEPS = ["a cute cat", "two dogs, oil painting"], ["blurry", "ugly"], [3, 4], 4
TIMESTEP = torch.tensor([700])


def their_pipeline(cls: Any, folder: Path, **changes: Any) -> Any:
    """A pipeline of diffusers with DDIM."""
    pipeline = cls.from_pretrained(folder, **changes)
    pipeline.scheduler = DDIMScheduler.from_config(
        dict(pipeline.scheduler.config), steps_offset=1, clip_sample=False, set_alpha_to_one=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def their_latents(pipeline: Any, guidance_scale: float, **settings: Any) -> Tensor:
    return pipeline(
        PROMPTS,
        negative_prompt=NEGATIVES if guidance_scale > 1 else None,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        height=64,
        width=72,
        generator=generators(*SEEDS),
        output_type="latent",
        **settings,
    ).images


@torch.no_grad()
def our_latents(model: StableDiffusion[Any], condition_scale: float, size: tuple[int, int] = (64, 72)) -> Tensor:
    model.solver = DDIM(STEPS, params=model.spec.solver_params)
    conditions = model.compute_conditions(PROMPTS, NEGATIVES, size)
    x = model.init_latents(size, generator=generators(*SEEDS))
    for step in model.steps:
        x = model(x, step, condition_scale=condition_scale, **conditions)
    return x


def pair(spec: UNetSpec) -> tuple[UNet, Any]:
    """A UNet at random weights, and diffusers' with the same."""
    torch.manual_seed(0)
    ours = UNet(spec)
    randomize(ours)
    theirs = UNet2DConditionModel(
        block_out_channels=spec.channels,
        layers_per_block=spec.blocks_per_level,
        down_block_types=tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in spec.transformer_layers),
        up_block_types=tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in spec.transformer_layers[::-1]),
        transformer_layers_per_block=tuple(max(layers, 1) for layers in spec.transformer_layers),
        attention_head_dim=spec.num_heads,
        cross_attention_dim=spec.text_dim,
        norm_num_groups=spec.norm_groups,
        use_linear_projection=spec.has_linear_projection,
    )
    names = diffusers_names(spec)
    theirs.load_state_dict({names.to_theirs(name): tensor for name, tensor in ours.state_dict().items()})
    return ours, theirs


def predict(unet: UNet, x: Tensor, text: Tensor, negatives: int = 0) -> Tensor:
    """negatives: how many of the batch are for negative prompts, as the model tells the UNet."""
    unet.set_timestep(TIMESTEP.expand(len(x)))
    unet.set_clip_text_embedding(text)
    unet.set_context("diffusion", {"negatives": negatives})
    return unet(x)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()
