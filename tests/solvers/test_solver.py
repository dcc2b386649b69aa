"""How solvers behave: trajectories, state, rebuilding, precision, devices and compilation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from refiners.solvers import (
    DDIM,
    DDPM,
    LCM,
    SOLVERS,
    DPMSolver,
    Euler,
    Heun,
    ModelPredictionType,
    NoiseSchedule,
    Solver,
    SolverParams,
    TimestepSpacing,
    UniPC,
    solver_by_name,
)

STOCHASTIC = ("ddpm", "euler-ancestral", "lcm")
every_solver = pytest.mark.parametrize("kind", SOLVERS.values(), ids=SOLVERS)
remembering_solvers = pytest.mark.parametrize("kind", [DPMSolver, Heun, UniPC], ids=lambda kind: kind.__name__)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or (2, 3, 4, 4), generator=torch.Generator().manual_seed(seed))


def sample(solver: Solver, x: Tensor, seed: int | None = 5) -> Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for step in solver.inference_steps:
        x = solver(x, torch.sin(solver.scale_model_input(x, step)) + step / 100, step, generator)
    return x


# -- trajectories


@every_solver
def test_same_seed_same_samples(kind: type[Solver]) -> None:
    solver = kind(8)
    x = solver.initial_noise_scale * noise()
    assert torch.equal(sample(solver, x), sample(solver, x))
    assert torch.equal(sample(solver, x), sample(kind(8), x))


@every_solver
def test_only_stochastic_solvers_heed_the_seed(kind: type[Solver]) -> None:
    solver = kind(8)
    x = solver.initial_noise_scale * noise()
    assert torch.equal(sample(solver, x, 1), sample(solver, x, 2)) == (kind not in map(solver_by_name, STOCHASTIC))


@every_solver
def test_without_generator_the_global_seed_counts(kind: type[Solver]) -> None:
    solver = kind(4)
    torch.manual_seed(5)
    expected = sample(solver, noise(), None)
    torch.manual_seed(5)
    assert torch.equal(sample(solver, noise(), None), expected)


def test_euler_with_full_sde_variance_is_euler_ancestral() -> None:
    params = SolverParams(sde_variance=1.0)
    ours, ancestral = Euler(8, params=params), solver_by_name("euler-ancestral")(8)
    x = ours.initial_noise_scale * noise()
    assert torch.equal(sample(ours, x), sample(ancestral, x))


def test_dpm_solver_between_ode_and_sde_keeps_the_variance() -> None:
    """With data of a single point at 0, x is all noise, and each level says how much."""
    solver = DPMSolver(20, params=SolverParams(sde_variance=0.5, model_prediction_type=ModelPredictionType.SAMPLE))
    x = solver.levels[0].noise * noise(100_000)
    for step in solver.inference_steps:
        x = solver(x, torch.zeros_like(x), step, torch.Generator().manual_seed(100 + step))
        assert float(x.std()) == pytest.approx(solver.levels[step + 1].noise, rel=0.02, abs=1e-6)


def test_heun_evaluates_each_level_but_the_first_twice() -> None:
    solver = Heun(4)
    assert solver.inference_steps == [0, 1, 2, 3, 4, 5, 6]
    assert solver.timesteps.tolist() == [999, 666, 666, 333, 333, 0, 0]
    assert Heun(4, first_inference_step=2).inference_steps == [4, 5, 6]


def test_ddpm_with_all_steps_visits_every_training_timestep() -> None:
    assert DDPM(1000).timesteps.tolist() == list(range(999, -1, -1))


@every_solver
def test_clean_prediction_can_be_looked_at(kind: type[Solver]) -> None:
    solver = kind(8, params=SolverParams(model_prediction_type=ModelPredictionType.VELOCITY))
    clean, epsilon = noise(seed=1), noise()
    for step in solver.inference_steps:
        level = solver.levels[step]
        velocity = (level.signal * epsilon - level.noise * clean) / level.size
        x = solver.add_noise(clean, epsilon, step)
        torch.testing.assert_close(solver.predict_clean(x, velocity, step), clean, rtol=1e-4, atol=1e-4)


@every_solver
def test_each_sample_of_a_batch_can_have_its_own_step(kind: type[Solver]) -> None:
    solver = kind(8)
    together = solver.add_noise(noise(seed=1), noise(), [6, 1])
    for index, step in enumerate([6, 1]):
        alone = solver.add_noise(noise(seed=1)[index : index + 1], noise()[index : index + 1], step)
        torch.testing.assert_close(together[index : index + 1], alone)
    torch.testing.assert_close(solver.remove_noise(together, noise(), [6, 1]), noise(seed=1), rtol=1e-4, atol=1e-4)


@every_solver
@pytest.mark.parametrize("count", [1, 2, 3])
def test_very_few_steps_work(kind: type[Solver], count: int) -> None:
    solver = kind(count)
    result = sample(solver, solver.initial_noise_scale * noise())
    assert bool(result.isfinite().all()) and math.isfinite(solver.initial_noise_scale)


def test_spellings_of_diffusers_serve_as_params() -> None:
    options: dict[str, Any] = {"noise_schedule": "squaredcos_cap_v2", "timesteps_spacing": "trailing"}
    params = SolverParams(noise_schedule=NoiseSchedule.COSINE, timesteps_spacing=TimestepSpacing.TRAILING)
    spelled = DDIM(10, params=SolverParams(**options))
    assert torch.equal(sample(spelled, noise()), sample(DDIM(10, params=params), noise()))


# -- state


@remembering_solvers
def test_new_trajectory_forgets_the_one_before(kind: type[Solver]) -> None:
    solver = kind(8)
    expected = sample(solver, noise())
    for step in solver.inference_steps[:5]:
        solver(noise(1, 7), noise(1, 7, seed=1), step)
    assert torch.equal(sample(solver, noise()), expected)


@remembering_solvers
def test_nothing_is_kept_after_the_last_step(kind: type[Solver]) -> None:
    solver = kind(8)
    sample(solver, noise())
    assert solver._memory == ()


@remembering_solvers
@pytest.mark.parametrize("step", [0, 1, 3], ids=["skipped the first", "repeated", "skipped"])
def test_steps_out_of_order_raise(kind: type[Solver], step: int) -> None:
    solver = kind(8, first_inference_step=0)
    for index in range(2 if step else 0):
        solver(noise(), noise(), index)
    wrong = step or 1
    with pytest.raises(ValueError, match=rf"step {2 if step else 0} should come now, but got {wrong}"):
        solver(noise(), noise(), wrong)


@remembering_solvers
def test_other_shape_within_a_trajectory_raises(kind: type[Solver]) -> None:
    solver = kind(8)
    solver(noise(), noise(), 0)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 4, 4\), but the trajectory so far has \(2, 3, 4, 4\)"):
        solver(noise(1, 3, 4, 4), noise(1, 3, 4, 4), 1)


@every_solver
def test_rebuilt_solver_equals_a_new_one(kind: type[Solver]) -> None:
    params = SolverParams(model_prediction_type=ModelPredictionType.VELOCITY)
    old = kind(8, first_inference_step=2, params=params)
    before = sample(old, noise())
    for rebuilt, new in (
        (old.rebuild(5), kind(5, 2, params=params)),
        (old.rebuild(5, 1), kind(5, 1, params=params)),
    ):
        assert rebuilt.inference_steps == new.inference_steps
        assert torch.equal(sample(rebuilt, noise()), sample(new, noise()))
    assert torch.equal(sample(old, noise()), before)


def test_rebuilt_lcm_keeps_its_original_steps() -> None:
    assert LCM(4, num_original_steps=20).rebuild(2).timesteps.tolist() == [999, 499]


# -- precision and devices


@every_solver
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_and_keeps_its_dtype(kind: type[Solver], dtype: torch.dtype) -> None:
    solver = kind(8)
    exact = solver.initial_noise_scale * noise()
    x = exact.to(dtype)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    for step in solver.inference_steps:
        output = torch.sin(solver.scale_model_input(exact, step))
        exact = solver.rebuild(8)(exact, output, step, generators[0]) if not solver.remembers else exact
        x = solver(x, output.to(dtype), step, generators[1])
        assert x.dtype == solver.scale_model_input(x, step).dtype == solver.add_noise(x, x, step).dtype == dtype
        assert bool(x.isfinite().all())
        if not solver.remembers:
            assert float((x - exact).abs().max() / exact.abs().max()) < 100 * torch.finfo(dtype).eps


@every_solver
def test_half_precision_steps_are_computed_in_float32(kind: type[Solver]) -> None:
    """Each step is the float32 step, rounded once."""
    half, single = kind(8), kind(8)
    x = (half.initial_noise_scale * noise()).half()
    for step in half.inference_steps:
        output = noise(seed=step).half()
        expected = single(x.float(), output.float(), step, torch.Generator().manual_seed(step))
        x = half(x, output, step, torch.Generator().manual_seed(step))
        assert torch.equal(x, expected.half())


@every_solver
def test_float64_is_computed_in_float64(kind: type[Solver]) -> None:
    params = SolverParams(model_prediction_type=ModelPredictionType.SAMPLE)
    solver, raised = kind(8, params=params), kind(8, params=params, dtype=torch.float64)
    x = noise().double()
    for step in solver.inference_steps:
        output = noise(seed=step).double()
        low = raised(x.float(), output.float(), step, torch.Generator().manual_seed(step))
        high = solver(x, output, step, torch.Generator().manual_seed(step))
        assert high.dtype == torch.float64 and low.dtype == torch.float32
        x = low.double()
        torch.testing.assert_close(high, x, rtol=1e-6, atol=1e-6)


@every_solver
def test_no_step_reads_the_values_of_a_tensor(kind: type[Solver]) -> None:
    """Tensors on meta have no values: whatever would wait for a device fails there."""
    solver = kind(8)
    x = torch.empty(2, 3, 4, 4, device="meta", dtype=torch.bfloat16)
    for step in solver.inference_steps:
        x = solver(x, solver.scale_model_input(x, step), step)
        assert solver.add_noise(x, x, step).is_meta
    assert x.is_meta and x.dtype == torch.bfloat16


@every_solver
def test_ambient_device_and_dtype_change_nothing(kind: type[Solver]) -> None:
    expected = kind(8)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            solver = kind(8)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(solver.timesteps, expected.timesteps)
    assert torch.equal(sample(solver, noise()), sample(expected, noise()))


def test_timesteps_move_with_the_solver() -> None:
    assert Euler(4, device="meta").timesteps.is_meta
    moved = Euler(4).to("meta", torch.float64)
    assert moved.timesteps.is_meta and moved.dtype == torch.float64 and moved.rebuild(5).timesteps.is_meta


@pytest.mark.slow
@every_solver
def test_steps_compile_into_a_few_graphs(kind: type[Solver]) -> None:
    torch.compiler.reset()
    counter = CompileCounter()

    def step_once(solver: Solver, x: Tensor, step: int) -> Tensor:
        return solver(x, torch.sin(solver.scale_model_input(x, step)), step)

    compiled: Any = torch.compile(step_once, fullgraph=True, backend=counter)
    solver, eager = kind(12), kind(12)
    x = y = solver.initial_noise_scale * noise()
    for step in solver.inference_steps:
        torch.manual_seed(step)
        x = compiled(solver, x, step)
        torch.manual_seed(step)
        y = step_once(eager, y, step)
    torch.testing.assert_close(x, y)
    assert counter.frame_count <= 6, "a graph for the first, the second, the last and other steps; not one for each"
    torch.compiler.reset()
