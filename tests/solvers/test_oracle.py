"""Each solver against the scheduler of the same name in diffusers, over all options that both have."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from solver_specimens import (
    ORACLES,
    WITH_CHOICE_OF_END,
    WITH_SIGMA_SCHEDULE,
    distance,
    model,
    noise,
    oracle,
    sample,
    sample_by_oracle,
)

from refiners.solvers import (
    DDIM,
    DDPM,
    LCM,
    DPMSolver,
    Euler,
    EulerAncestral,
    Heun,
    ModelPredictionType,
    NoiseSchedule,
    SigmaSchedule,
    Solver,
    SolverParams,
    TimestepSpacing,
    UniPC,
)

# diffusers hands torch tensors to numpy in a way that is to change.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

WITH_CUSTOM_TIMESTEPS = (DDPM, DPMSolver, Euler, Heun, LCM)
BY_RATIO = (Euler, EulerAncestral, Heun)
PLAIN = {"sigma_schedule": None, "rescale_to_zero_terminal_snr": False, "sde_variance": None}
STEP_COUNTS = (5, 10, 20, 30, 50)
TOLERANCE = 1e-4

every_solver = pytest.mark.parametrize("kind", ORACLES, ids=lambda kind: kind.__name__)
every_prediction = pytest.mark.parametrize("prediction", ModelPredictionType)
every_schedule = pytest.mark.parametrize("schedule", NoiseSchedule)


def options_of(kind: type[Solver]) -> Iterator[dict[str, Any]]:
    spacings = (None,) if kind is LCM else TimestepSpacing
    sigma_schedules = (None, SigmaSchedule.KARRAS) if kind in WITH_SIGMA_SCHEDULE else (None,)
    rescales = (False,) if kind is Heun else (False, True)
    variances = (None, 1.0) if kind is DPMSolver else (None,)
    for spacing, sigma_schedule, rescale, variance in product(spacings, sigma_schedules, rescales, variances):
        if sigma_schedule and kind in (DPMSolver, UniPC) and spacing != TimestepSpacing.LEADING:
            continue  # the spacing makes no difference there
        yield {
            "timesteps_spacing": spacing,
            "sigma_schedule": sigma_schedule,
            "rescale_to_zero_terminal_snr": rescale,
            "sde_variance": variance,
        }


def is_comparable(solver: Solver) -> bool:
    """Whether diffusers can be held to TOLERANCE: where it cannot, a test or a comment below says why."""
    params = solver.params
    is_cosine = params.noise_schedule == NoiseSchedule.COSINE
    if isinstance(solver, DDIM) and not isinstance(solver, DDPM):
        # It steps from t to t - T // n, whatever timestep comes next (see test_ddim_goes_to_the_next_timestep).
        return solver.spacing != TimestepSpacing.LINSPACE and (
            solver.spacing == TimestepSpacing.LEADING or 1000 % solver.num_inference_steps == 0
        )
    if isinstance(solver, DPMSolver) and not isinstance(solver, UniPC) and is_cosine and params.sigma_schedule:
        return False  # it rounds Karras timesteps down for this schedule only, but for others to the nearest
    # It adds and takes away noise up to 20,000 times the signal (see test_large_ratios_keep_their_precision).
    return not (isinstance(solver, BY_RATIO) and is_cosine and solver.levels[0].noise > 1000)


def build(kind: type[Solver], count: int, **options: Any) -> Solver | None:
    """The solver, or None where a model that predicts noise would start without any signal: we raise."""
    try:
        return kind(count, params=SolverParams(**options))
    except ValueError as error:
        assert "no signal" in str(error) and options["rescale_to_zero_terminal_snr"]
        return None


@every_solver
@every_prediction
@every_schedule
def test_trajectories_are_those_of_diffusers(
    kind: type[Solver], prediction: ModelPredictionType, schedule: NoiseSchedule
) -> None:
    if kind is EulerAncestral and prediction == ModelPredictionType.SAMPLE:
        pytest.skip("diffusers does not have it")
    # All counts with the plainest options; elsewhere one each, such that each option meets each count in some test.
    shift = list(ModelPredictionType).index(prediction) + 3 * list(NoiseSchedule).index(schedule)
    for index, options in enumerate(options_of(kind)):
        is_plain = schedule == NoiseSchedule.QUADRATIC and options == {**options, **PLAIN}
        for count in STEP_COUNTS if is_plain else [STEP_COUNTS[(index + shift) % len(STEP_COUNTS)]]:
            solver = build(kind, count, noise_schedule=schedule, model_prediction_type=prediction, **options)
            if solver is None or not is_comparable(solver):
                continue
            theirs = oracle(solver)
            ours = sample(solver, solver.initial_noise_scale * noise())
            expected = sample_by_oracle(theirs, theirs.init_noise_sigma * noise())
            assert distance(ours, expected) < TOLERANCE, (count, options)
            assert solver.initial_noise_scale == pytest.approx(float(theirs.init_noise_sigma), rel=1e-5)
            assert solver.timesteps.dtype == theirs.timesteps.dtype
            # Karras timesteps of diffusers come from float32 ratios, whose logarithms are flat at the clean end.
            slack = 0.3 if solver.params.sigma_schedule and not solver.convention.has_whole_timesteps else 0
            assert (solver.timesteps - theirs.timesteps).abs().max() <= slack, (count, options)


@every_solver
@pytest.mark.parametrize("first", [1, 4, 9])
def test_image_to_image_is_that_of_diffusers(kind: type[Solver], first: int) -> None:
    solver = kind(10, first_inference_step=first)
    start = solver.first_inference_step
    theirs = oracle(solver)
    image = noise(1)
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(start)
    expected_start = theirs.add_noise(image, noise(), theirs.timesteps[start : start + 1])
    ours_start = solver.add_noise(image, noise(), start)
    assert distance(ours_start, expected_start) < 1e-5
    assert distance(sample(solver, ours_start), sample_by_oracle(theirs, expected_start, start)) < TOLERANCE


@every_solver
def test_noise_is_added_as_in_diffusers_at_every_step(kind: type[Solver]) -> None:
    solver = kind(10)
    theirs = oracle(solver)
    for step, timestep in enumerate(theirs.timesteps):
        if hasattr(theirs, "set_begin_index"):
            theirs.set_begin_index(step)
        expected = theirs.add_noise(noise(1), noise(), timestep[None])
        assert distance(solver.add_noise(noise(1), noise(), step), expected) < 1e-5


@every_solver
def test_model_input_is_scaled_as_in_diffusers(kind: type[Solver]) -> None:
    solver = kind(10)
    theirs = oracle(solver)
    for step, timestep in enumerate(theirs.timesteps):
        if hasattr(theirs, "set_begin_index"):
            theirs._step_index = step
        assert distance(solver.scale_model_input(noise(), step), theirs.scale_model_input(noise(), timestep)) < 1e-5


@pytest.mark.parametrize("kind", WITH_CUSTOM_TIMESTEPS, ids=lambda kind: kind.__name__)
def test_custom_timesteps_are_those_of_diffusers(kind: type[Solver]) -> None:
    timesteps = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)
    solver = kind(10, params=SolverParams(custom_timesteps=timesteps))
    theirs = oracle(solver)
    ours = sample(solver, solver.initial_noise_scale * noise())
    assert distance(ours, sample_by_oracle(theirs, theirs.init_noise_sigma * noise())) < TOLERANCE
    assert torch.equal(solver.timesteps, theirs.timesteps)


@pytest.mark.parametrize("kind", WITH_CHOICE_OF_END, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("count", [10, 20])
@pytest.mark.parametrize("spacing", [TimestepSpacing.LEADING, TimestepSpacing.TRAILING])
def test_end_with_noise_is_that_of_diffusers(kind: type[Solver], count: int, spacing: TimestepSpacing) -> None:
    solver = kind(count, params=SolverParams(ends_clean=False, timesteps_spacing=spacing))
    theirs = oracle(solver)
    ours = sample(solver, solver.initial_noise_scale * noise())
    assert distance(ours, sample_by_oracle(theirs, theirs.init_noise_sigma * noise())) < TOLERANCE


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_takes_eta_as_in_diffusers(eta: float) -> None:
    solver = DDIM(10, params=SolverParams(sde_variance=eta))
    theirs = oracle(solver)
    generator = torch.Generator().manual_seed(3)
    x = noise()
    for timestep in theirs.timesteps:
        x = theirs.step(model(x, timestep), timestep, x, eta=eta, generator=generator).prev_sample
    assert distance(sample(solver, noise()), x) < TOLERANCE


@pytest.mark.parametrize("spacing", [TimestepSpacing.LINSPACE, TimestepSpacing.TRAILING])
@pytest.mark.parametrize("count", STEP_COUNTS)
def test_ddim_goes_to_the_next_timestep(spacing: TimestepSpacing, count: int) -> None:
    """The DDIM of diffusers goes elsewhere with these spacings; but its Euler is DDIM in other units."""
    solver = DDIM(count, params=SolverParams(timesteps_spacing=spacing))
    timesteps = [int(timestep) for timestep in solver.timesteps]
    theirs = oracle(Euler(count, params=SolverParams(custom_timesteps=timesteps)))
    first = solver.levels[0]
    assert distance(sample(solver, noise()), sample_by_oracle(theirs, noise() / first.signal)) < TOLERANCE


@pytest.mark.parametrize("kind", [Euler, EulerAncestral, Heun], ids=lambda kind: kind.__name__)
@every_prediction
def test_large_ratios_keep_their_precision(kind: type[Solver], prediction: ModelPredictionType) -> None:
    """Cosine schedules start at noise 20,000 times the signal; diffusers loses three digits there, in one step."""
    params = SolverParams(noise_schedule=NoiseSchedule.COSINE, model_prediction_type=prediction)
    for count in (5, 20):
        single, double = kind(count, params=params), kind(count, params=params, dtype=torch.float64)
        x = single.initial_noise_scale * noise()
        output = model(single.scale_model_input(x, 0), single.timesteps[0])
        exact = double(x.double(), output.double(), 0, torch.Generator().manual_seed(3))
        assert distance(single(x, output, 0, torch.Generator().manual_seed(3)).double(), exact) < 1e-6
