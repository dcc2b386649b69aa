"""Where the steps of a solver lie: its timesteps and noise ratios, laid on the training schedule."""

from dataclasses import dataclass

import numpy as np

from refiners.solvers.params import SolverParams, TimestepSpacing
from refiners.solvers.schedule import (
    SMALLEST_SIGNAL_POWER,
    Array,
    karras_ratios,
    noise_ratios,
    ratios_of_timesteps,
    signal_powers,
    spaced_timesteps,
    timesteps_of_ratios,
)


@dataclass(frozen=True)
class Convention:
    """How a family of solvers lays its steps; the same options mean different grids to different families.

    has_whole_timesteps: fractional timesteps are rounded.
    has_end_point: spacings hold one more point, the end, and Karras ratios span all training levels instead of those
        that the spacing reaches.
    has_finite_ratios: a level without signal is replaced by one with almost none.
    """

    has_whole_timesteps: bool
    has_end_point: bool
    has_finite_ratios: bool


# By timestep (DDPM, DDIM, LCM); by the ratio (Euler, Heun); by its logarithm (DPM-Solver, UniPC). As in diffusers.
BY_TIMESTEP = Convention(has_whole_timesteps=True, has_end_point=False, has_finite_ratios=False)
BY_RATIO = Convention(has_whole_timesteps=False, has_end_point=False, has_finite_ratios=True)
BY_LOG_RATIO = Convention(has_whole_timesteps=True, has_end_point=True, has_finite_ratios=True)


@dataclass(frozen=True)
class Grid:
    """timesteps: (steps,), falling.  ratios: (steps + 1,), noise over signal at each step and at the end."""

    timesteps: Array
    ratios: Array


def lay_grid(convention: Convention, params: SolverParams, timesteps: Array) -> Grid:
    """Find the noise ratios of the steps, and with a sigma schedule also their true timesteps."""
    powers = signal_powers(params)
    needs_finite_ratios = convention.has_finite_ratios or params.sigma_schedule is not None
    if params.rescale_to_zero_terminal_snr and needs_finite_ratios:
        powers[-1] = SMALLEST_SIGNAL_POWER
    train_ratios = noise_ratios(powers)
    ratios = ratios_of_timesteps(timesteps, train_ratios)
    if params.sigma_schedule is not None:
        span = train_ratios[::-1] if convention.has_end_point else ratios
        ratios = karras_ratios(span[0], span[-1], len(timesteps))
        timesteps = timesteps_of_ratios(ratios, train_ratios)
        if convention.has_whole_timesteps:
            timesteps = np.round(timesteps)
    end = 0.0 if params.ends_clean else train_ratios[0]
    return Grid(timesteps, np.append(ratios, end))


def choose_timesteps(
    convention: Convention, params: SolverParams, count: int, spacing: TimestepSpacing, offset: int
) -> Array:
    """The timesteps of `count` steps, (count,): the custom ones if there are any, else those of the spacing.

    Raises ValueError if their number is not `count`, if they repeat, or if they pass the last training timestep.
    """
    if params.custom_timesteps is not None:
        if len(params.custom_timesteps) != count:
            raise ValueError(
                f"custom_timesteps holds {len(params.custom_timesteps)} timesteps, but there are {count} steps; "
                "give one for each"
            )
        return np.asarray(params.custom_timesteps, dtype=np.float64)
    train_count = params.num_train_timesteps
    timesteps = spaced_timesteps(spacing, count, train_count, offset, convention.has_end_point)
    if convention.has_whole_timesteps:
        timesteps = np.round(timesteps)
    if timesteps[0] >= train_count:
        raise ValueError(
            f"{count} steps with timesteps_offset={offset} reach timestep {timesteps[0]:.0f}, but the last one is "
            f"{train_count - 1}; lower timesteps_offset"
        )
    if np.any(np.diff(timesteps) >= 0):
        raise ValueError(
            f"{count} steps do not fit into {train_count} training timesteps with spacing {spacing}; take fewer"
        )
    return timesteps
