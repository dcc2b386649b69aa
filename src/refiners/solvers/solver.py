"""What all solvers are: levels of noise to go through, and a few weights for each step, applied to tensors.

A step is x_next = a * x + b * clean + c * memory + … + d * noise: a solver is its weights, and what it remembers.
They are worked out once, in float64, and kept on the CPU as tensors of no dimension rather than as Python floats:
neither makes a step wait for a device, but with floats torch.compile would make a graph for each step.
"""

from collections.abc import Iterable, Sequence
from copy import copy
from typing import ClassVar, Self

import torch
from torch import Tensor

from refiners.fluxion.checks import described, instance_of, whole_number
from refiners.solvers.grid import BY_TIMESTEP, Convention, choose_timesteps, lay_grid
from refiners.solvers.levels import Level, clean_weights, first_order_weights
from refiners.solvers.params import ModelPredictionType, SolverParams, TimestepSpacing
from refiners.solvers.schedule import Array

Generators = torch.Generator | Sequence[torch.Generator] | None


class Solver:
    """Leads noise to clean samples, step by step, with a model that predicts noise (or velocity, or the samples).

        x = solver.initial_noise_scale * torch.randn(shape)
        for step in solver.inference_steps:
            predicted_noise = model(solver.scale_model_input(x, step), solver.timesteps[step])
            x = solver(x, predicted_noise, step)

    A step is an index into `timesteps`, 0 is the noisiest. A tensor x has any shape; a result has the shape and dtype
    of x, and is computed in float32 at least. A solver that remembers follows one trajectory at a time.

    num_inference_steps: 1 … params.num_train_timesteps.
    first_inference_step: how many steps to leave out at the noisy end, to start from an image (see `add_noise`).
    params: None is Stable Diffusion's schedule.
    device: where `timesteps` lies, the CPU by default; x may lie anywhere.
    dtype: float64 computes steps in float64; lower ones change nothing.

    Raises ValueError if the steps, or steps and params together, make no sense.
    """

    convention: ClassVar[Convention] = BY_TIMESTEP
    default_spacing: ClassVar[TimestepSpacing] = TimestepSpacing.LEADING
    default_offset: ClassVar[int] = 1  # Stable Diffusion's
    default_sde_variance: ClassVar[float] = 0.0
    takes_sde_variance: ClassVar[bool] = True
    has_unit_variance: ClassVar[bool] = True
    remembers: ClassVar[bool] = False

    def __init__(
        self,
        num_inference_steps: int,
        first_inference_step: int = 0,
        params: SolverParams | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.params = instance_of(SolverParams() if params is None else params, SolverParams, "params", "SolverParams")
        self.device = torch.device(device or "cpu")
        self.dtype = instance_of(dtype, torch.dtype, "dtype", "one, such as torch.float32")
        self.spacing = self.params.timesteps_spacing or self.default_spacing
        self.sde_variance = self._choose_sde_variance()
        self._lay(num_inference_steps, first_inference_step)

    @property
    def first_inference_step(self) -> int:
        """The step at which a trajectory starts, as an index into `timesteps`."""
        return self.inference_steps[0]

    @property
    def initial_noise_scale(self) -> float:
        """What to multiply unit noise with, to start at step 0."""
        if self.has_unit_variance:
            return 1.0
        # Leading spacing starts below the last training timestep, where pure noise stands for x with some signal, so
        # it gets the size of x. The others count x there as all noise, as in k-diffusion.
        return self.levels[0].size if self.spacing == TimestepSpacing.LEADING else self.levels[0].noise

    def __call__(self, x: Tensor, predicted_noise: Tensor, step: int, generator: Generators = None) -> Tensor:
        """Go from the level of `step` to that of the next step, or to a clean sample after the last one.

        predicted_noise: the output of the model, whatever `params.model_prediction_type` says that it predicts.
        generator: source of fresh noise, where the solver needs it, or one for each sample of the batch, which then
            does not depend on its neighbours; it may be of another device than x.
        Raises IndexError if there is no such step, and ValueError for shapes that differ, tensors that are not floats,
        and steps out of order if the solver remembers.
        """
        self._check(x, predicted_noise, step)
        self._follow(x, step)
        wide = x.to(self._working_dtype(x))
        clean = weigh(self._clean_weights[step], (wide, predicted_noise.to(wide.dtype)))
        result = self._advance(wide, clean, step)
        if self._is_stochastic:
            result = result + weigh(self._noise_weights[step], [unit_noise(wide, generator)])
        if step == len(self.levels) - 2:
            self._memory = ()
        return result.to(x.dtype)

    def scale_model_input(self, x: Tensor, step: int) -> Tensor:
        """Bring x to the unit variance that models are trained with. Raises IndexError if there is no such step."""
        self.check_step(step)
        return x if self.has_unit_variance else self._weigh_at(self._input_weights, [x], step)

    def predict_clean(self, x: Tensor, predicted_noise: Tensor, step: int) -> Tensor:
        """The clean sample that the output of the model at `step` speaks of. Arguments and errors as for a step."""
        self._check(x, predicted_noise, step)
        return self._weigh_at(self._clean_weights, (x, predicted_noise), step)

    def add_noise(self, x: Tensor, noise: Tensor, step: int | Sequence[int]) -> Tensor:
        """Move clean samples to the level of `step` (arXiv 2006.11239, eq. 4).

        noise: unit variance.  step: one for all, or one for each sample of the batch, x.shape[0].
        Raises IndexError if there is no such step, and ValueError for shapes that differ.
        """
        self._check(x, noise, step)
        return self._weigh_at(self._level_weights, (x, noise), step)

    def remove_noise(self, x: Tensor, noise: Tensor, step: int | Sequence[int]) -> Tensor:
        """Undo `add_noise`, with the same arguments and errors. Undefined (inf or nan) at a level without signal."""
        self._check(x, noise, step)
        return self._weigh_at(self._denoise_weights, (x, noise), step)

    def rebuild(self, num_inference_steps: int, first_inference_step: int | None = None) -> Self:
        """A new solver with other steps and all else the same; None leaves out as many steps as this one does."""
        first = self._left_out if first_inference_step is None else first_inference_step
        rebuilt = copy(self)
        rebuilt._lay(num_inference_steps, first)
        return rebuilt

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move `timesteps` to `device`, and change `dtype`, in place; None changes nothing."""
        self.device = self.device if device is None else torch.device(device)
        self.dtype = dtype or self.dtype
        self.timesteps = self.timesteps.to(self.device)
        return self

    def check_step(self, step: int | Sequence[int]) -> None:
        """Raise IndexError if there is no such step, or one of several, and TypeError for what is no whole number."""
        for one in step if isinstance(step, Sequence) else [step]:
            if not isinstance(one, int):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    f"a step of {type(self).__name__} is an int, as in inference_steps, but this is {described(one)}"
                )
            if not 0 <= one < len(self.levels) - 1:
                raise IndexError(
                    f"{type(self).__name__} has no step {one}, only 0 … {len(self.levels) - 2}; use inference_steps"
                )

    # -- what a kind of solver decides

    def _choose_timesteps(self, count: int) -> Array:
        offset = self.default_offset if self.params.timesteps_offset is None else self.params.timesteps_offset
        return choose_timesteps(self.convention, self.params, count, self.spacing, offset)

    def _visit(self, count: int) -> list[int]:
        """The points of the grid, 0 … count-1, at which the model is evaluated, one by one."""
        return list(range(count))

    def _weights(self, step: int) -> tuple[list[float], float]:
        """Weights of x, the clean prediction and what `_remember` gave before; and the weight of fresh noise."""
        of_x, of_clean, of_noise = first_order_weights(self.levels[step], self.levels[step + 1], self.sde_variance)
        return [of_x, of_clean], of_noise

    def _remember(self, x: Tensor, clean: Tensor, step: int) -> tuple[Tensor, ...]:
        return ()

    def _advance(self, x: Tensor, clean: Tensor, step: int) -> Tensor:
        """The next x, without fresh noise."""
        result = weigh(self._step_weights[step], (x, clean, *self._memory))
        self._memory = self._remember(x, clean, step)
        return result

    # -- laying the steps

    def _choose_sde_variance(self) -> float:
        asked = self.params.sde_variance
        if asked is None or asked == self.default_sde_variance:
            return self.default_sde_variance
        if not self.takes_sde_variance:
            raise ValueError(
                f"{type(self).__name__} has a sde_variance of {self.default_sde_variance} only, but params ask for "
                f"{asked}; leave it out, or use DPMSolver, DDIM or EulerAncestral"
            )
        return asked

    def _lay(self, count: int, left_out: int) -> None:
        count, left_out = whole_number(count, "num_inference_steps"), whole_number(left_out, "first_inference_step")
        train_count = self.params.num_train_timesteps
        if not 1 <= count <= train_count:
            raise ValueError(f"num_inference_steps should be from 1 to {train_count}, but it is {count}")
        if not 0 <= left_out < count:
            raise ValueError(f"first_inference_step should be from 0 to {count - 1}, but it is {left_out}")
        grid = lay_grid(self.convention, self.params, self._choose_timesteps(count))
        points = self._visit(count)
        make_level = Level.of_unit_variance if self.has_unit_variance else Level.of_unit_signal
        self.num_inference_steps = count
        self.levels = [make_level(float(grid.ratios[point])) for point in [*points, count]]
        dtype = torch.int64 if self.convention.has_whole_timesteps else torch.float32
        self.timesteps = cpu_float64(grid.timesteps[points].tolist()).to(dtype).to(self.device)
        last_visit = len(points) - 1 - points[::-1].index(left_out)
        self.inference_steps = list(range(last_visit, len(points)))
        self._left_out = left_out
        self._memory: tuple[Tensor, ...] = ()
        self._next_step = self.first_inference_step
        self._lay_weights()

    def _lay_weights(self) -> None:
        levels = self.levels[:-1]
        prediction = self.params.model_prediction_type
        if prediction == ModelPredictionType.NOISE and not levels[0].signal:
            raise ValueError(
                "model_prediction_type is epsilon, but the first timestep has no signal, where noise tells nothing "
                "about the clean sample; models for rescale_to_zero_terminal_snr predict v_prediction or sample"
            )
        rows = [self._weights(step) for step in range(len(levels))]
        self._step_weights = weight_table(weights for weights, _ in rows)
        self._noise_weights = weight_table([of_noise] for _, of_noise in rows)
        self._is_stochastic = any(of_noise for _, of_noise in rows)
        self._clean_weights = weight_table(clean_weights(level, prediction) for level in levels)
        self._denoise_weights = weight_table(clean_weights(level, ModelPredictionType.NOISE) for level in levels)
        self._level_weights = weight_table((level.signal, level.noise) for level in levels)
        self._input_weights = weight_table([1 / level.size] for level in levels)

    # -- checks

    def _check(self, x: Tensor, other: Tensor, step: int | Sequence[int]) -> None:
        self.check_step(step)
        for name, tensor in (("x", x), ("the noise", other)):
            instance_of(tensor, Tensor, f"{type(self).__name__}: {name}", "a tensor")
        if x.shape != other.shape:
            raise ValueError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)}, but the noise has {tuple(other.shape)}; "
                "they should be the same"
            )
        if not (x.is_floating_point() and other.is_floating_point()):
            raise ValueError(
                f"{type(self).__name__} needs floats, but x is {x.dtype} and the noise {other.dtype}; convert them"
            )
        if not isinstance(step, int) and len(step) != x.shape[0]:
            raise ValueError(
                f"{type(self).__name__}: {len(step)} steps were given for a batch of {x.shape[0]}; give one for each "
                "sample, or a single number"
            )

    def _follow(self, x: Tensor, step: int) -> None:
        """Start a new trajectory at the first step; else make sure that `step` and x continue the present one."""
        if step == self.first_inference_step:
            self._memory = ()
        elif self.remembers and not torch.compiler.is_compiling() and step != self._next_step:  # else a graph a step
            raise ValueError(
                f"{type(self).__name__} remembers earlier steps, so step {self._next_step} should come now, but got "
                f"{step}; restart at step {self.first_inference_step}, or rebuild with another first_inference_step"
            )
        if self._memory and self._memory[0].shape != x.shape:
            raise ValueError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)}, but the trajectory so far has "
                f"{tuple(self._memory[0].shape)}; restart at step {self.first_inference_step} to sample another"
            )
        self._next_step = step + 1

    # -- tensors

    def _working_dtype(self, x: Tensor) -> torch.dtype:
        return torch.promote_types(torch.promote_types(x.dtype, self.dtype), torch.float32)

    def _weigh_at(self, table: Tensor, tensors: Sequence[Tensor], step: int | Sequence[int]) -> Tensor:
        x = tensors[0]
        dtype = self._working_dtype(x)
        rows = table[step] if isinstance(step, int) else table[list(step)].to(dtype).to(x.device)
        if not isinstance(step, int):
            rows = rows.T.reshape(len(tensors), -1, *[1] * (x.ndim - 1))
        return weigh(rows, [tensor.to(dtype) for tensor in tensors]).to(x.dtype)


def weight_table(rows: Iterable[Iterable[float]]) -> Tensor:
    """Rows of weights as one tensor (rows, longest row), float64 on the CPU; short rows end in zeros."""
    table = [list(row) for row in rows]
    longest = max(len(row) for row in table)
    return cpu_float64([row + [0.0] * (longest - len(row)) for row in table])


def cpu_float64(values: list[float] | list[list[float]]) -> Tensor:
    """The values exactly, whatever device and dtype are ambient (a model may be under construction on meta)."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def weigh(weights: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Sum of tensors, each times its weight, (k, …); weights beyond the tensors there are count as zero."""
    products = [weight * tensor for weight, tensor in zip(weights.to(tensors[0].dtype), tensors, strict=False)]
    return sum(products[1:], products[0])


def unit_noise(like: Tensor, generator: Generators) -> Tensor:
    """Unit noise of the shape, dtype and device of `like`, from one generator or from one for each sample.

    It is drawn on the generator's device and in float32, so that a seed gives the same noise in every precision.
    Raises ValueError if there are several generators, but not one for each sample.
    """
    if isinstance(generator, Sequence):
        if len(generator) != like.shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {like.shape[0]}: give one for each sample")
        return torch.cat([unit_noise(like[i : i + 1], each) for i, each in enumerate(generator)])
    if generator is not None:
        instance_of(generator, torch.Generator, "the generator", "one, such as torch.Generator().manual_seed(0)")
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=torch.float32).to(like)
