"""What holds for all solvers, steps and params."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refiners.solvers import (
    LCM,
    SOLVERS,
    DPMSolver,
    Euler,
    Heun,
    ModelPredictionType,
    NoiseSchedule,
    SigmaSchedule,
    Solver,
    SolverParams,
    TimestepSpacing,
    UniPC,
)

with_deadline = settings(deadline=None, max_examples=60)


@st.composite
def solvers(draw: st.DrawFn) -> Solver:
    kind = draw(st.sampled_from(list(SOLVERS.values())))
    rescale = draw(st.booleans())
    predictions = [ModelPredictionType.VELOCITY, ModelPredictionType.SAMPLE]
    params = SolverParams(
        timesteps_spacing=None if kind is LCM else draw(st.sampled_from(TimestepSpacing)),
        noise_schedule=draw(st.sampled_from(NoiseSchedule)),
        sigma_schedule=None if kind is LCM else draw(st.sampled_from([None, SigmaSchedule.KARRAS])),
        model_prediction_type=draw(
            st.sampled_from(predictions if rescale else [*predictions, ModelPredictionType.NOISE])
        ),
        rescale_to_zero_terminal_snr=rescale,
    )
    count = draw(st.integers(1, 50))
    return kind(count, draw(st.integers(0, count - 1)), params=params)


def output_of_perfect_model(solver: Solver, x: Tensor, point: Tensor, step: int) -> Tensor:
    """What a model says that has seen nothing but `point`."""
    level = solver.levels[step]
    epsilon = (x - level.signal * point) / level.noise
    outputs = {
        ModelPredictionType.NOISE: epsilon,
        ModelPredictionType.SAMPLE: point,
        ModelPredictionType.VELOCITY: (level.signal * epsilon - level.noise * point) / level.size,
    }
    return outputs[solver.params.model_prediction_type]


def tensors(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    return first, second


@given(solver=solvers(), seed=st.integers(0, 2**32), data=st.data())
@with_deadline
def test_removing_the_noise_that_was_added_gives_back_x(solver: Solver, seed: int, data: st.DataObject) -> None:
    step = data.draw(st.sampled_from(solver.inference_steps))
    x, noise = tensors(seed)
    if solver.levels[step].signal:
        noisy = solver.add_noise(x, noise, step)
        tolerance = 1e-13 * solver.levels[step].size / solver.levels[step].signal
        torch.testing.assert_close(solver.remove_noise(noisy, noise, step), x, rtol=0, atol=tolerance + 1e-12)


@given(solver=solvers(), seed=st.integers(0, 2**32))
@with_deadline
def test_perfect_model_of_a_single_point_leads_to_it(solver: Solver, seed: int) -> None:
    point, x = tensors(seed)
    x = solver.add_noise(point, x, solver.first_inference_step)
    for step in solver.inference_steps:
        x = solver(x, output_of_perfect_model(solver, x, point, step), step, torch.Generator().manual_seed(seed))
    # LCM keeps a little of x by design: 7e-6 of it at timestep 19, and less before.
    torch.testing.assert_close(x, point, rtol=0, atol=1e-4 if isinstance(solver, LCM) else 1e-7)


@given(solver=solvers(), seed=st.integers(0, 2**32))
@with_deadline
def test_deterministic_steps_keep_to_the_straight_line_of_a_single_point(solver: Solver, seed: int) -> None:
    """With a perfect model of one point the ODE is solved exactly, by solvers of every order."""
    if not isinstance(solver, DPMSolver | UniPC | Euler | Heun) or solver.sde_variance:
        return
    point, noise = tensors(seed)
    x = solver.add_noise(point, noise, solver.first_inference_step)
    for step in solver.inference_steps:
        x = solver(x, output_of_perfect_model(solver, x, point, step), step)
        goal = solver.levels[step + 1]
        torch.testing.assert_close(x, goal.signal * point + goal.noise * noise, rtol=1e-7, atol=1e-7)


@given(solver=solvers())
@with_deadline
def test_levels_fall_and_end_clean(solver: Solver) -> None:
    ratios = [level.ratio for level in solver.levels]
    assert all(before >= after for before, after in pairwise(ratios))
    assert ratios[-1] == 0
    assert solver.timesteps.min() >= 0 and solver.timesteps.max() <= 999
    assert len(solver.timesteps) == len(solver.levels) - 1
