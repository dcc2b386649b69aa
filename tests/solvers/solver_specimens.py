"""diffusers' scheduler for each solver, and a sample by both."""

import inspect
from typing import Any

import diffusers
import torch
from torch import Tensor

from refiners.solvers import (
    DDIM,
    DDPM,
    LCM,
    DPMSolver,
    Euler,
    EulerAncestral,
    Heun,
    NoiseSchedule,
    SigmaSchedule,
    Solver,
    UniPC,
)
from refiners.solvers.schedule import SMALLEST_SIGNAL_POWER, signal_powers

ORACLES: dict[type[Solver], tuple[str, dict[str, Any]]] = {
    DDPM: ("DDPMScheduler", {"clip_sample": False}),
    DDIM: ("DDIMScheduler", {"clip_sample": False}),
    DPMSolver: ("DPMSolverMultistepScheduler", {}),
    Euler: ("EulerDiscreteScheduler", {}),
    EulerAncestral: ("EulerAncestralDiscreteScheduler", {}),
    Heun: ("HeunDiscreteScheduler", {}),
    UniPC: ("UniPCMultistepScheduler", {}),
    LCM: ("LCMScheduler", {}),
}

WITH_SIGMA_SCHEDULE = (DPMSolver, Euler, Heun, UniPC)
WITH_CHOICE_OF_END = (DDIM, DPMSolver, Euler, UniPC)


def model(x: Tensor, timestep: Tensor) -> Tensor:
    """Not linear in x, and different at each timestep."""
    time = float(timestep) / 1000
    return 0.7 * torch.tanh(x * (0.6 + 0.3 * time)).roll(1, -1) + 0.5 * torch.sin(1.3 * x + 2 * time) + 0.1 * time


def oracle(solver: Solver, **options: Any) -> Any:
    """The scheduler that should do as `solver` does, from the same params."""
    params = solver.params
    name, defaults = ORACLES[type(solver)]
    scheduler: Any = getattr(diffusers, name)
    known = inspect.signature(scheduler).parameters
    wanted = {
        "num_train_timesteps": params.num_train_timesteps,
        "beta_start": params.initial_diffusion_rate,
        "beta_end": params.final_diffusion_rate,
        "beta_schedule": params.noise_schedule.value,
        "prediction_type": params.model_prediction_type.value,
        "timestep_spacing": solver.spacing.value,
        "steps_offset": solver.default_offset if params.timesteps_offset is None else params.timesteps_offset,
        "use_karras_sigmas": params.sigma_schedule == SigmaSchedule.KARRAS,
        "rescale_betas_zero_snr": params.rescale_to_zero_terminal_snr,
        "algorithm_type": "sde-dpmsolver++" if params.sde_variance else "dpmsolver++",
        "final_sigmas_type": "zero" if params.ends_clean else "sigma_min",
        "set_alpha_to_one": params.ends_clean,
    }
    theirs = scheduler(**{key: value for key, value in wanted.items() if key in known} | defaults | options)
    if params.noise_schedule == NoiseSchedule.COSINE:
        # Near the clean end 1 - ᾱ is 4e-5 there, of which the float32 of diffusers keeps three digits.
        powers = torch.from_numpy(signal_powers(params))
        if params.rescale_to_zero_terminal_snr and solver.convention.has_finite_ratios:
            powers[-1] = SMALLEST_SIGNAL_POWER
        theirs.alphas_cumprod = powers
    if params.custom_timesteps is None:
        theirs.set_timesteps(solver.num_inference_steps)
    else:
        theirs.set_timesteps(timesteps=list(params.custom_timesteps))
    return theirs


def sample(solver: Solver, x: Tensor, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    for step in solver.inference_steps:
        x = solver(x, model(solver.scale_model_input(x, step), solver.timesteps[step]), step, generator)
    return x


def sample_by_oracle(theirs: Any, x: Tensor, first: int = 0, seed: int = 3) -> Tensor:
    options: dict[str, Any] = {}
    if "generator" in inspect.signature(theirs.step).parameters:
        options["generator"] = torch.Generator().manual_seed(seed)
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(first)
    for timestep in theirs.timesteps[first:]:
        x = theirs.step(model(theirs.scale_model_input(x, timestep), timestep), timestep, x, **options).prev_sample
    return x


def noise(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Greatest difference relative to the greatest value; inf if anything is not finite."""
    found = float((ours - theirs).abs().max() / theirs.abs().max())
    return found if found == found else float("inf")
