"""Pictures from prompts in one call: latents, steps, mask, progress and decoding around a latent diffusion model."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from refiners.fluxion.checks import described, instance_of, list_of_texts, picture, real_number, whole_number
from refiners.foundationals.latent_diffusion.model import LatentDiffusionModel
from refiners.foundationals.latent_diffusion.stages import AfterStep, lay_stages
from refiners.foundationals.latent_diffusion.tiles import tile_side
from refiners.solvers import Solver, solver_by_name
from refiners.solvers.solver import unit_noise

REFINER_START = 0.8  # Stable Diffusion XL's refiner was trained for the last fifth


class GenerationCancelled(Exception):
    """A callback asked to stop; no pictures were made."""


@dataclass(frozen=True)
class StepReport:
    """What a callback is told after each step.

    number: 1 … count.  latents: (B, C, h, w), at the level of the next step.
    clean: the latents as they would be in the end, by the prediction of this step.
    model: the one that made the step, a refiner in its part of the way.
    """

    number: int
    count: int
    latents: Tensor
    clean: Tensor
    model: LatentDiffusionModel

    def preview(self) -> list[Image.Image]:
        """The pictures as they would be in the end, by the prediction of this step. Costs a decoding."""
        return self.model.lda.latents_to_images(self.clean)


OnStep = Callable[[StepReport], bool | None]


class TextToImage(LatentDiffusionModel):
    """A latent diffusion model that makes pictures in one call."""

    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = "",
        *,
        seed: int | Sequence[int] = 0,
        num_inference_steps: int | None = None,
        condition_scale: float | None = None,
        solver: Solver | str | None = None,
        size: tuple[int, int] | None = None,
        init_image: Image.Image | None = None,
        strength: float = 0.75,
        mask: Image.Image | None = None,
        refiner: LatentDiffusionModel | None = None,
        refiner_start: float = REFINER_START,
        tile_size: int | None = None,
        on_step: OnStep | None = None,
        show_progress: bool = True,
    ) -> list[Image.Image]:
        """Make pictures, as one batch. The model's own solver stays as it was.

        prompt, negative_prompt, seed: one for all pictures, or one for each. A picture depends on its own only.
            A negative prompt of None is what the model was trained with where there is none: see `compute_conditions`.
        num_inference_steps: None for as many as the model's solver has, 30 by default.
        condition_scale: of classifier-free guidance, 1 for no guidance; None for the spec's, mostly 7.5.
        solver: a name as in `refiners.solvers.SOLVERS`, a solver, or None for the model's.
        size: height and width in pixels; None for that of `init_image`, or else of the pictures it was trained on.
        init_image: start from this picture, with noise of `strength`, in (0, 1], of the whole way.
        mask: keep `init_image` where it is black.
        refiner: goes on from `refiner_start` of the way, with the same prompts; see `lay_stages`.
        tile_size: side in pixels of the tiles in which pictures are encoded and decoded, to save memory; None for
            whole.
        on_step: called after each step; no more steps are taken once it returns False.
        Raises ValueError for what does not fit the model and TypeError for what is of a wrong type, both before the
        first step; GenerationCancelled if `on_step` returned False.
        """
        rows = _rows(prompt, "" if negative_prompt is None else negative_prompt, seed)
        self._check(init_image, strength, mask, condition_scale, tile_size, on_step)
        size = self.size_for(init_image) if size is None else size
        latents_size = self.latents_size(size)
        whole = self._solver_for(solver, num_inference_steps, 1.0 if init_image is None else strength)
        stages = lay_stages(self, whole, refiner, refiner_start)
        prompts, negatives, seeds = zip(*rows, strict=True)
        given = None if negative_prompt is None else negatives
        conditions = [stage.model.compute_conditions(prompts, given, size) for stage in stages]
        generators = [torch.Generator().manual_seed(each) for each in seeds]
        noise = unit_noise(self._like(len(rows), latents_size), generators)
        with stages[0].begun():
            x = self.init_latents(size, None if strength == 1 else init_image, noise, tile_size=tile_size)
        with _reporter(sum(len(stage.steps) for stage in stages), on_step, show_progress) as report:
            for stage, own in zip(stages, conditions, strict=True):
                model, x = stage.model, x.to(stage.model.device, stage.model.dtype)
                scale = model.spec.condition_scale if condition_scale is None else condition_scale
                with stage.begun():
                    kept = (init_image, mask, size, noise.to(x), tile_size) if init_image and mask else None
                    x = stage.run(x, own, scale, generators, kept and model.prepare_mask(*kept), report)
        return stages[-1].model.lda.latents_to_images(x, tile_size=tile_size)

    def size_for(self, image: Image.Image | None) -> tuple[int, int]:
        """Height and width of what is made from that picture, or from none, where no size is asked for."""
        if image is None:
            return self.spec.default_size, self.spec.default_size
        factor = self.lda.spec.downsampling_factor
        return max(image.height // factor, 1) * factor, max(image.width // factor, 1) * factor

    def _solver_for(self, solver: Solver | str | None, num_inference_steps: int | None, strength: float) -> Solver:
        count = self.solver.num_inference_steps
        if num_inference_steps is not None:
            count = whole_number(num_inference_steps, "num_inference_steps")
        if isinstance(solver, str):
            return solver_by_name(solver)(count, _left_out(count, strength), params=self.spec.solver_params)
        solver = self.solver if solver is None else instance_of(solver, Solver, "the solver", "one, or its name")
        return solver.rebuild(count, first_inference_step=_left_out(count, strength))

    def _check(
        self,
        init_image: Image.Image | None,
        strength: float,
        mask: Image.Image | None,
        condition_scale: float | None,
        tile_size: int | None,
        on_step: Any,
    ) -> None:
        for name, image in (("init_image", init_image), ("the mask", mask)):
            if image is not None:
                picture(image, name)
        if condition_scale is not None:
            real_number(condition_scale, "condition_scale")
        if tile_size is not None:
            tile_side(tile_size, self.lda.spec.downsampling_factor)
        if on_step is not None and not callable(on_step):
            raise TypeError(f"on_step is {described(on_step)}: give a function that takes a StepReport")
        if not 0 < real_number(strength, "strength") <= 1:
            raise ValueError(
                f"strength is {strength}, but should be above 0 (the picture as it is) and at most 1 (all new)"
            )
        if mask is not None and init_image is None:
            raise ValueError("a mask says what to keep of init_image, but there is none: give both")
        if self.spec.is_inpainting and mask is None:
            raise ValueError(
                f"{type(self).__name__} fills in a part of a picture: give init_image, and a mask that is white where "
                "to fill in, all over for a picture that is all new"
            )


def _left_out(count: int, strength: float) -> int:
    return count - max(int(count * strength), 1)


def _rows(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str], seed: int | Sequence[int]
) -> list[tuple[str, str, int]]:
    """Prompt, negative prompt and seed of each picture."""
    prompts, negatives = list_of_texts(prompt, "the prompt"), list_of_texts(negative_prompt, "the negative prompt")
    seeds = [_checked_seed(each) for each in (seed if isinstance(seed, Sequence) else [seed])]
    columns: list[list[Any]] = [prompts, negatives, seeds]
    count = max(map(len, columns))
    if any(len(column) not in (1, count) for column in columns):
        raise ValueError(
            f"{len(prompts)} prompts, {len(negatives)} negative prompts and {len(seeds)} seeds: give one of each, or "
            "as many as there are pictures"
        )
    return list(zip(*(column * (count // len(column)) for column in columns), strict=True))


def _checked_seed(seed: int) -> int:
    number = whole_number(seed, "a seed")
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"the seed {number} should be from -2**63 to 2**64 - 1, as torch has it")
    return number


@contextmanager
def _reporter(count: int, on_step: OnStep | None, is_shown: bool) -> Generator[AfterStep]:
    """What is to be told of each of `count` steps, and tells the callback and the progress bar."""
    numbers = iter(range(1, count + 1))
    with _progress(count, is_shown) as advance:

        def report(model: LatentDiffusionModel, x: Tensor, predict_clean: Callable[[], Tensor]) -> None:
            number = next(numbers)
            advance()
            if on_step and on_step(StepReport(number, count, x, predict_clean(), model)) is False:
                raise GenerationCancelled(f"on_step returned False after step {number} of {count}")

        yield report


@contextmanager
def _progress(count: int, is_shown: bool) -> Generator[Callable[[], None]]:
    if not is_shown:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        task = progress.add_task("denoising", total=count)
        yield lambda: progress.advance(task)
