"""Noise schedules as pure functions on float64 arrays: rates, signal, noise ratios, spacings.

T training timesteps, 0 the cleanest. `signal_powers` is the papers' ᾱ, (T,), in [0, 1]. A noise ratio is
√((1 - ᾱ) / ᾱ), which k-diffusion and Karras call sigma.
"""

from math import pow, sqrt

import numpy as np
from numpy.typing import NDArray

from refiners.solvers.params import NoiseSchedule, SolverParams, TimestepSpacing

Array = NDArray[np.floating]

# The smallest number of half precision: the ᾱ that stands for none where a noise ratio has to be finite. Its ratio is
# 4096. diffusers chose it, and results depend on it.
SMALLEST_SIGNAL_POWER = 2.0**-24


def signal_powers(params: SolverParams) -> Array:
    """ᾱ at each training timestep, (T,): the share of the variance that is signal (arXiv 2006.11239, eq. 4)."""
    rates = diffusion_rates(
        params.noise_schedule, params.num_train_timesteps, params.initial_diffusion_rate, params.final_diffusion_rate
    )
    powers = np.cumprod(1 - rates)
    return without_terminal_signal(powers) if params.rescale_to_zero_terminal_snr else powers


def diffusion_rates(schedule: NoiseSchedule, count: int, initial: float, final: float) -> Array:
    """The betas, (count,): `initial` at the cleanest timestep, `final` at the noisiest. Cosine takes neither."""
    if schedule == NoiseSchedule.COSINE:
        return cosine_diffusion_rates(count)
    if schedule == NoiseSchedule.QUADRATIC:
        return np.square(np.linspace(sqrt(initial), sqrt(final), count))
    return np.linspace(initial, final, count)


def cosine_diffusion_rates(count: int) -> Array:
    """Betas whose ᾱ falls as a squared cosine, at most 0.999 each (arXiv 2102.09672, eq. 17; 0.008 is their s)."""
    times = np.linspace(0, 1, count + 1)
    powers = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - powers[1:] / powers[:-1], 0.999)


def without_terminal_signal(powers: Array) -> Array:
    """Shift and stretch √ᾱ so that it ends at 0 and still begins where it did (arXiv 2305.08891, algorithm 1)."""
    roots = np.sqrt(powers)
    if len(roots) < 2:
        raise ValueError(
            f"rescale_to_zero_terminal_snr needs at least 2 training timesteps, but num_train_timesteps is {len(roots)}"
        )
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


def noise_ratios(powers: Array) -> Array:
    """√((1 - ᾱ) / ᾱ) for each ᾱ, inf where there is no signal."""
    with np.errstate(divide="ignore"):
        return np.sqrt((1 - powers) / powers)


def karras_ratios(largest: float, smallest: float, count: int) -> Array:
    """Noise ratios from `largest` to `smallest`, even in their seventh roots (arXiv 2206.00364, eq. 5; rho = 7).

    With count 1 it is the largest.
    """
    return np.power(np.linspace(pow(largest, 1 / 7), pow(smallest, 1 / 7), count), 7)


def timesteps_of_ratios(ratios: Array, train_ratios: Array) -> Array:
    """The fractional training timestep of each noise ratio, linear in the logarithm of the ratio."""
    return np.interp(np.log(ratios), np.log(train_ratios), np.arange(len(train_ratios)))


def ratios_of_timesteps(timesteps: Array, train_ratios: Array) -> Array:
    """The noise ratio at each training timestep; between two whole ones it is linear in the ratio."""
    lower = np.floor(timesteps).astype(np.int64)
    upper = np.ceil(timesteps).astype(np.int64)
    if np.array_equal(lower, upper):  # an infinite ratio cannot be interpolated
        return train_ratios[lower]
    return np.interp(timesteps, np.arange(len(train_ratios)), train_ratios)


def spaced_timesteps(spacing: TimestepSpacing, count: int, train_count: int, offset: int, has_end_point: bool) -> Array:
    """`count` falling timesteps, whole except with linspace (arXiv 2305.08891, table 2).

    has_end_point: the spacing holds one more point, the end, which is no step. Trailing spacing never has one.
    offset: for leading spacing only.
    """
    if spacing == TimestepSpacing.TRAILING:
        # Some fall half way between two, as with 48 steps of 1000; `arange` rounds them off as diffusers does.
        return np.round(np.arange(train_count, 0, -train_count / count)[:count]) - 1
    points = count + has_end_point
    if spacing == TimestepSpacing.LINSPACE:
        return np.linspace(0, train_count - 1, points)[::-1][:count]
    return (np.arange(points) * (train_count // points) + offset)[::-1][:count].astype(np.float64)
