"""Schedules and weights as pure functions, against diffusers and against the mathematics."""

from typing import Any

import diffusers
import numpy as np
import pytest

from refiners.solvers import NoiseSchedule, SolverParams, TimestepSpacing
from refiners.solvers.levels import Level, first_order_weights
from refiners.solvers.schedule import (
    karras_ratios,
    noise_ratios,
    ratios_of_timesteps,
    signal_powers,
    spaced_timesteps,
    timesteps_of_ratios,
)
from refiners.solvers.unipc import second_order_correction


@pytest.mark.parametrize("schedule", NoiseSchedule)
@pytest.mark.parametrize("rescale", [False, True], ids=["plain", "zero terminal SNR"])
def test_signal_is_that_of_diffusers(schedule: NoiseSchedule, rescale: bool) -> None:
    scheduler: Any = getattr(diffusers, "DDPMScheduler")  # noqa: B009  # diffusers exports lazily
    theirs = scheduler(beta_start=8.5e-4, beta_end=1.2e-2, beta_schedule=schedule.value, rescale_betas_zero_snr=rescale)
    ours = signal_powers(SolverParams(noise_schedule=schedule, rescale_to_zero_terminal_snr=rescale))
    np.testing.assert_allclose(ours, theirs.alphas_cumprod.numpy(), rtol=1e-5, atol=2e-6)


def test_zero_terminal_snr_keeps_the_first_level_and_ends_without_signal() -> None:
    plain = signal_powers(SolverParams())
    rescaled = signal_powers(SolverParams(rescale_to_zero_terminal_snr=True))
    assert rescaled[0] == pytest.approx(plain[0], rel=1e-14) and rescaled[-1] == 0
    assert noise_ratios(rescaled)[-1] == np.inf


def test_karras_ratios_are_those_of_the_paper() -> None:
    steps = np.arange(10)
    expected = (80 ** (1 / 7) + steps / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(karras_ratios(80, 0.002, 10), expected)


def test_timesteps_and_ratios_are_inverse_at_whole_timesteps() -> None:
    ratios = noise_ratios(signal_powers(SolverParams()))
    timesteps = np.array([999.0, 500, 1, 0])
    np.testing.assert_allclose(timesteps_of_ratios(ratios_of_timesteps(timesteps, ratios), ratios), timesteps)


@pytest.mark.parametrize("count", range(1, 120))
def test_trailing_spacing_has_as_many_timesteps_as_steps(count: int) -> None:
    timesteps = spaced_timesteps(TimestepSpacing.TRAILING, count, 1000, 0, has_end_point=False)
    assert len(timesteps) == count and timesteps[0] == 999 and timesteps[-1] >= 0


@pytest.mark.parametrize("ratio", [0.0, 1e-3, 1.0, 4096.0, float("inf")])
def test_levels_of_unit_variance_have_it(ratio: float) -> None:
    level = Level.of_unit_variance(ratio)
    assert level.size == pytest.approx(1, rel=1e-14) and level.ratio == pytest.approx(ratio, rel=1e-14)


@pytest.mark.parametrize("variance", [0.0, 0.4, 1.0])
def test_a_step_ends_with_the_noise_of_its_goal(variance: float) -> None:
    start, goal = Level.of_unit_variance(3.0), Level.of_unit_variance(0.7)
    of_x, of_clean, of_noise = first_order_weights(start, goal, variance)
    assert of_x * start.signal + of_clean == pytest.approx(goal.signal, rel=1e-14)
    assert (of_x * start.noise) ** 2 + of_noise**2 == pytest.approx(goal.noise**2, rel=1e-14)


def test_corrector_integrates_parabolas_exactly() -> None:
    """Its shares are those of a numerical integral of the exponential weight of the step."""
    before, start, goal = (Level.of_unit_variance(ratio) for ratio in (5.0, 2.0, 0.6))
    h, position = np.log(2.0 / 0.6), -np.log(5.0 / 2.0) / np.log(2.0 / 0.6)
    new, old = second_order_correction(before, start, goal)
    nodes, masses = np.polynomial.legendre.leggauss(30)
    times = (nodes + 1) / 2
    weights = masses * np.exp(h * times)
    for power in (1, 2):
        exact = (weights * times**power).sum() / weights.sum()
        assert new + old * position**power == pytest.approx(exact, rel=1e-12)
