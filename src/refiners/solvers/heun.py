"""Heun's method: two evaluations of the model a step, the second to correct the first."""

from typing import ClassVar

from torch import Tensor

from refiners.solvers.euler import Euler


class Heun(Euler):
    """Heun's method on the probability flow ODE (arXiv 2206.00364, algorithm 1 without fresh noise).

    An inference step here is one evaluation of the model, so that the loop stays the same: a solver of n steps has
    2n - 1 of them, as the last step needs no correction. Even ones are Euler steps to the next level, odd ones redo
    them with the mean of both slopes. `first_inference_step=k` of the constructor leaves out k whole steps; the
    property then is 2k.
    """

    takes_sde_variance: ClassVar[bool] = False
    remembers: ClassVar[bool] = True

    def _visit(self, count: int) -> list[int]:
        return [(evaluation + 1) // 2 for evaluation in range(2 * count - 1)]

    def _weights(self, step: int) -> tuple[list[float], float]:
        if step % 2 == 0:
            return super()._weights(step)
        # The slope is (x - clean) / noise, and the Euler step kept that with its own clean prediction. So the mean of
        # both slopes differs from the first by half the change of the prediction, which is all that must be added:
        # nothing as large as the noise appears, so nothing is lost to rounding.
        start, goal = self.levels[step - 1].noise, self.levels[step].noise
        correction = (start - goal) / goal / 2
        return [1.0, correction, -correction], 0.0

    def _remember(self, x: Tensor, clean: Tensor, step: int) -> tuple[Tensor, ...]:
        return (clean,) if step % 2 == 0 else ()
