"""The way from noise to a picture in stages, each gone by a model of its own: a base and its refiner.

That is the ensemble of experts (arXiv 2211.01324, section 4) which Stable Diffusion XL has for its last steps
(arXiv 2307.01952, section 2.5).
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

from torch import Tensor

from refiners.foundationals.latent_diffusion.model import LatentDiffusionModel
from refiners.solvers import Solver
from refiners.solvers.solver import Generators

# Told after each step of the latents, and how to find those which the step predicts for the end.
AfterStep = Callable[[LatentDiffusionModel, Tensor, Callable[[], Tensor]], None]


@dataclass(frozen=True)
class Stage:
    """A part of the way. solver: laid for the whole way.  steps: those of the solver that are taken."""

    model: LatentDiffusionModel
    solver: Solver
    steps: Sequence[int]

    @contextmanager
    def begun(self) -> Generator[None]:
        """Inside `with`, the model has the solver; afterwards it is as it was."""
        with self.model.unchanged():
            self.model.solver = self.solver
            yield

    def run(
        self,
        x: Tensor,
        conditions: Mapping[str, Tensor],
        condition_scale: float,
        generators: Generators,
        keep: Callable[[Tensor, int], Tensor] | None,
        after_step: AfterStep,
    ) -> Tensor:
        """From latents at the level of the first step to those after the last one; to be called inside `begun`.

        keep: what is done to x after each step, see `prepare_mask`.
        """
        model = self.model
        for step in self.steps:
            predicted = model.predict_noise(x, step, condition_scale=condition_scale, **conditions)
            predict_clean = partial(self.solver.predict_clean, x, predicted, step)
            x = self.solver(x, predicted, step=step, generator=generators)
            x = keep(x, step) if keep else x
            after_step(model, x, predict_clean)
        return x


def lay_stages(
    base: LatentDiffusionModel, solver: Solver, refiner: LatentDiffusionModel | None, start: float
) -> list[Stage]:
    """One stage without a refiner, else the base's and the refiner's, with the same steps.

    solver: with the steps of both; one that remembers begins anew with the refiner.
    start: the refiner takes the steps whose timestep is below a share of 1 - start of the training schedule, as in
        diffusers, where the pair is called denoising_end and denoising_start.
    Raises ValueError if the two do not share latents and training schedule, or one of them has no step to take.
    """
    if refiner is None:
        return [Stage(base, solver, solver.inference_steps)]
    _check_pair(base, refiner)
    count, train_count = solver.num_inference_steps, solver.params.num_train_timesteps
    if not 0 < start < 1:
        raise ValueError(f"refiner_start is {start}, but should be a share of the way, above 0 and below 1")
    first = round(train_count - start * train_count)
    timesteps = cast("list[float]", solver.timesteps.tolist())
    left = len({timestep for timestep in timesteps if timestep >= first})
    steps_of_base = solver.inference_steps
    if left < count:
        rest = solver.rebuild(count, first_inference_step=left)
        steps_of_base = [step for step in solver.inference_steps if step < rest.first_inference_step]
        if steps_of_base:
            return [Stage(base, solver, steps_of_base), Stage(refiner, rest, rest.inference_steps)]
    raise ValueError(
        f"of {count} steps, of which {len(solver.inference_steps)} are taken, a refiner from {start} of the way on "
        f"leaves none to the {'base' if left < count else 'refiner'}: choose another refiner_start, or more steps"
    )


def _check_pair(base: LatentDiffusionModel, refiner: LatentDiffusionModel) -> None:
    for what in ("latent_channels", "latent_scale", "downsampling_factor"):
        ours, theirs = getattr(base.spec.autoencoder, what), getattr(refiner.spec.autoencoder, what)
        if ours != theirs:
            raise ValueError(
                f"the refiner's autoencoder has {what} {theirs}, but that of the model has {ours}: a refiner goes on "
                "from the model's latents, so take one that was made for it"
            )
    if base.spec.solver_params != refiner.spec.solver_params:
        raise ValueError(
            f"the refiner was trained with {refiner.spec.solver_params}, but the model with {base.spec.solver_params}: "
            "a refiner goes on with the model's solver, so take one that was made for it"
        )
