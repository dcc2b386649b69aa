"""Pictures from prompts in one call: latents, steps, mask, progress and decoding around a latent diffusion model."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from refiners.fluxion.checks import described, instance_of, list_of_texts, picture, real_number, whole_number
from refiners.foundationals.latent_diffusion.model import LatentDiffusionModel
from refiners.foundationals.latent_diffusion.tiles import tile_side
from refiners.solvers import Solver, solver_by_name
from refiners.solvers.solver import unit_noise


class GenerationCancelled(Exception):
    """A callback asked to stop; no pictures were made."""


@dataclass(frozen=True)
class StepReport:
    """What a callback is told after each step.

    number: 1 … count.  latents: (B, C, h, w), at the level of the next step.
    clean: the latents as they would be in the end, by the prediction of this step.
    """

    number: int
    count: int
    latents: Tensor
    clean: Tensor
    model: LatentDiffusionModel

    def preview(self) -> list[Image.Image]:
        """The pictures as they would be in the end, by the prediction of this step. Costs a decoding."""
        return self.model.lda.latents_to_images(self.clean)


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
        tile_size: int | None = None,
        on_step: Callable[[StepReport], bool | None] | None = None,
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
        tile_size: side in pixels of the tiles in which pictures are encoded and decoded, to save memory; None for
            whole.
        on_step: called after each step; no more steps are taken once it returns False.
        Raises ValueError for what does not fit the model and TypeError for what is of a wrong type, both before the
        first step; GenerationCancelled if `on_step` returned False.
        """
        rows = _rows(prompt, "" if negative_prompt is None else negative_prompt, seed)
        scale = self.spec.condition_scale if condition_scale is None else condition_scale
        self._check(init_image, strength, mask, scale, tile_size, on_step)
        size = self.size_for(init_image) if size is None else size
        latents_size = self.latents_size(size)
        before = self.solver
        self.solver = self._solver_for(solver, num_inference_steps, 1.0 if init_image is None else strength)
        try:
            prompts, negatives, seeds = zip(*rows, strict=True)
            generators = [torch.Generator().manual_seed(each) for each in seeds]
            conditions = self.compute_conditions(prompts, None if negative_prompt is None else negatives, size)
            noise = unit_noise(self._like(len(rows), latents_size), generators)
            x = self.init_latents(size, None if strength == 1 else init_image, noise, tile_size=tile_size)
            with (
                self.filling_in(init_image, mask, size, noise) if init_image and mask else nullcontext() as after_step,
                _progress(len(self.steps), show_progress) as advance,
            ):
                for number, step in enumerate(self.steps, start=1):
                    predicted = self.predict_noise(x, step, condition_scale=scale, **conditions)
                    clean = self.solver.predict_clean(x, predicted, step) if on_step else x
                    x = self.solver(x, predicted, step=step, generator=generators)
                    x = after_step(x, step) if after_step else x
                    advance()
                    if on_step and on_step(StepReport(number, len(self.steps), x, clean, self)) is False:
                        raise GenerationCancelled(f"on_step returned False after step {number} of {len(self.steps)}")
            return self.lda.latents_to_images(x, tile_size=tile_size)
        finally:
            self.solver = before

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
        scale: float,
        tile_size: int | None,
        on_step: Any,
    ) -> None:
        for name, image in (("init_image", init_image), ("the mask", mask)):
            if image is not None:
                picture(image, name)
        real_number(scale, "condition_scale")
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
def _progress(count: int, is_shown: bool) -> Generator[Callable[[], None]]:
    if not is_shown:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        task = progress.add_task("denoising", total=count)
        yield lambda: progress.advance(task)
