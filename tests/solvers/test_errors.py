"""What a user can get wrong, and what the errors say."""

from typing import Any

import pytest
import torch
from torch import Tensor

from refiners.solvers import (
    DDIM,
    DDPM,
    LCM,
    SOLVERS,
    DPMSolver,
    Euler,
    Heun,
    SigmaSchedule,
    Solver,
    SolverParams,
    TimestepSpacing,
    solver_by_name,
)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 4, 4), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [0, -3, 1001])
def test_impossible_number_of_steps_raises(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps should be from 1 to 1000, but it is {count}"):
        Euler(count)


@pytest.mark.parametrize("first", [-1, 10])
def test_impossible_first_step_raises(first: int) -> None:
    with pytest.raises(ValueError, match=f"first_inference_step should be from 0 to 9, but it is {first}"):
        DDIM(10, first_inference_step=first)


@pytest.mark.parametrize("step", [-1, 10])
def test_step_out_of_range_raises(step: int) -> None:
    solver = DDIM(10)
    for call in (
        lambda: solver(noise(), noise(), step),
        lambda: solver.add_noise(noise(), noise(), step),
        lambda: solver.remove_noise(noise(), noise(), [0, step]),
        lambda: solver.scale_model_input(noise(), step),
    ):
        with pytest.raises(IndexError, match=f"DDIM has no step {step}, only 0 … 9"):
            call()


def test_tensors_that_do_not_fit_raise() -> None:
    solver = DDIM(10)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 4, 4\), but the noise has \(1, 3, 4, 4\)"):
        solver(noise(), noise(1, 3, 4, 4), 0)
    with pytest.raises(ValueError, match=r"needs floats, but x is torch\.int64"):
        solver(noise().long(), noise(), 0)
    with pytest.raises(ValueError, match="3 steps were given for a batch of 2"):
        solver.add_noise(noise(), noise(), [1, 2, 3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps should be at least 1, but it is 0"),
        ({"initial_diffusion_rate": 0.5}, r"initial_diffusion_rate is 0\.5 and final_diffusion_rate is 0\.012"),
        ({"timesteps_offset": -1}, "timesteps_offset should not be negative, but it is -1"),
        ({"sde_variance": 1.5}, r"but it is 1\.5"),
        ({"custom_timesteps": (5, 7)}, "5 is followed by 7"),
        ({"custom_timesteps": (1000, 7)}, "should lie in 0 … 999, but they go from 1000 to 7"),
        ({"custom_timesteps": (7, 5), "sigma_schedule": SigmaSchedule.KARRAS}, "sigma_schedule=karras both set"),
        ({"timesteps_spacing": "tight"}, "'tight' is no TimestepSpacing; choose from linspace, leading, trailing"),
        ({"noise_schedule": "tight"}, "choose from linear, scaled_linear, squaredcos_cap_v2"),
        ({"model_prediction_type": "tight"}, "choose from epsilon, v_prediction, sample"),
        ({"sigma_schedule": "tight"}, "choose from karras"),
    ],
)
def test_impossible_params_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SolverParams(**options)


@pytest.mark.parametrize(
    ("kind", "count", "options", "message"),
    [
        (Heun, 5, {"sde_variance": 0.5}, r"Heun has a sde_variance of 0\.0 only, but params ask for 0\.5"),
        (DDIM, 1000, {}, "reach timestep 1000, but the last one is 999; lower timesteps_offset"),
        (DPMSolver, 1000, {}, "1000 steps do not fit into 1000 training timesteps with spacing linspace"),
        (Euler, 3, {"custom_timesteps": (9, 5)}, "custom_timesteps holds 2 timesteps, but there are 3 steps"),
        (LCM, 51, {}, "LCM chooses its 51 steps among num_original_steps=50"),
        (LCM, 4, {"timesteps_spacing": TimestepSpacing.TRAILING}, "LCM takes its timesteps from those"),
        (DDIM, 5, {"rescale_to_zero_terminal_snr": True, "timesteps_spacing": "trailing"}, "timestep has no signal"),
        (DDPM, 1, {"rescale_to_zero_terminal_snr": True, "num_train_timesteps": 1}, "needs at least 2 training"),
    ],
)
def test_steps_and_params_that_clash_raise(
    kind: type[Solver], count: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(count, params=SolverParams(**options))


def test_unknown_name_raises_with_all_names() -> None:
    with pytest.raises(ValueError, match=f"there is no solver 'eular'; choose from {', '.join(SOLVERS)}"):
        solver_by_name("eular")


def test_every_solver_has_its_class_name_and_a_plain_name() -> None:
    for name, kind in SOLVERS.items():
        assert solver_by_name(name) is solver_by_name(kind.__name__) is solver_by_name(name.replace("-", "_")) is kind


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DDIM("30"), "num_inference_steps should be a whole number, but it is the str '30'"),
        (lambda: DDIM(30, 1.5), r"first_inference_step should be a whole number, but it is the float 1\.5"),
        (lambda: DDIM(30, params={"ends_clean": False}), "params is the dict {'ends_clean': False}: give SolverParams"),
        (lambda: DDIM(30, dtype="float32"), "dtype is the str 'float32': give one, such as"),
        (lambda: DDIM(30).rebuild("3"), "num_inference_steps should be a whole number"),
        (lambda: LCM(4, num_original_steps=50.0), r"num_original_steps should be a whole number, .* 50\.0"),
        (lambda: SolverParams(num_train_timesteps="1000"), "num_train_timesteps should be a whole number"),
        (lambda: SolverParams(timesteps_offset=0.5), "timesteps_offset should be a whole number"),
        (lambda: SolverParams(final_diffusion_rate="x"), "final_diffusion_rate should be a number, but it is the str"),
        (lambda: SolverParams(sde_variance="x"), "sde_variance should be a number, but it is the str 'x'"),
        (lambda: SolverParams(custom_timesteps=5), "custom_timesteps is the int 5: give a list or tuple"),
        (lambda: SolverParams(custom_timesteps=(9.5, 3)), r"each of custom_timesteps should be a whole .* float 9\.5"),
        (lambda: DDIM(5)("x", noise(), 0), "DDIM: x is the str 'x': give a tensor"),
        (lambda: DDIM(5)(noise(), None, 0), "DDIM: the noise is None: give a tensor"),
        (lambda: DDIM(5)(noise(), noise(), 0.0), r"a step of DDIM is an int, as in inference_steps, .* float 0\.0"),
        (
            lambda: DDIM(5).add_noise(noise(), noise(), torch.tensor([0, 1])),
            "a step .* but this is a Tensor",
        ),
        (lambda: DDIM(5).add_noise(noise(), noise(), [0, 1.0]), r"a step of DDIM is an int, .* the float 1\.0"),
        (lambda: DDPM(5)(noise(), noise(), 0, 3), "the generator is the int 3: give one, such as torch"),
        (lambda: solver_by_name(None), "the name of a solver is None: give one of ddim, ddpm"),
    ],
)
def test_what_is_of_a_wrong_type_is_named(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()
