"""From the time step, and what else counts for the picture as a whole, to the time embedding of a UNet.

(B,) time steps to (B, time_dim); pooled text, time ids and the scale of guidance come through contexts.
"""

import math

import torch
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.foundationals.latent_diffusion.unet_spec import UNetSpec


class TimestepEncoder(fl.Chain):
    """The time step as sines and cosines of falling frequency, then a small perceptron: (B,) to (B, time_dim)."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__(
            Sinusoids(spec.channels[0]),
            fl.Converter(),
            *([GuidanceEncoder(spec)] if spec.guidance_waves else []),
            fl.Linear(spec.channels[0], spec.time_dim),
            fl.SiLU(),
            fl.Linear(spec.time_dim, spec.time_dim),
            *([TextTimeEncoder(spec)] if spec.pooled_text_dim else []),
            fl.SiLU(),  # each residual block starts with it, so it is done once
        )


class Sinusoids(fl.Module):
    """cos and sin of t / 10000^(2 i / width), for i = 0 … width / 2 - 1: (…) to (…, width).

    Source: arXiv 1706.03762, section 3.5.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, timestep: Tensor) -> Tensor:
        angles = timestep.float()[..., None] * _frequencies(self.width // 2, self.width // 2, timestep.device)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def extra_repr(self) -> str:
        return str(self.width)


class GuidanceSinusoids(Sinusoids):
    """sin and cos of 1000 (w - 1) / 10000^(i / (width / 2 - 1)) for a guidance scale w: (B,) to (B, width).

    Unlike `Sinusoids`, sines come first and the last frequency is 1 / 10000: so in the released models of arXiv
    2310.04378.
    """

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.width // 2
        angles = 1000 * (timestep.float()[..., None] - 1) * _frequencies(half, half - 1, timestep.device)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _frequencies(count: int, last: int, device: torch.device) -> Tensor:
    """10000^(-i / last), for i = 0 … count - 1."""
    return torch.exp(-math.log(10000) / last * torch.arange(count, dtype=torch.float32, device=device))


class GuidanceEncoder(fl.Residual):
    """Adds the scale of guidance to the waves of the time step (arXiv 2310.04378, section 4.2)."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__(
            fl.UseContext("diffusion", "condition_scale"),
            GuidanceSinusoids(spec.guidance_waves),
            fl.Converter(),
            fl.Linear(spec.guidance_waves, spec.channels[0], bias=False),
        )


class TextTimeEncoder(fl.Residual):
    """Adds to the time embedding what the text as a whole and the time ids tell (arXiv 2307.01952, section 2.2)."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__(
            fl.Concatenate(
                fl.UseContext("diffusion", "pooled_text_embedding"),
                fl.Chain(
                    fl.UseContext("diffusion", "time_ids"),
                    Sinusoids(spec.time_id_waves),
                    fl.Flatten(start_dim=1),
                ),
                dim=1,
            ),
            fl.Converter(),
            fl.Linear(spec.pooled_text_dim + spec.num_time_ids * spec.time_id_waves, spec.time_dim),
            fl.SiLU(),
            fl.Linear(spec.time_dim, spec.time_dim),
        )
