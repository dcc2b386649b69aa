"""UniPC: the steps of DPM-Solver++, each corrected once the model has been evaluated where it led."""

from math import expm1, log
from typing import ClassVar

from torch import Tensor

from refiners.solvers.dpm import DPMSolver
from refiners.solvers.levels import Level, first_order_weights
from refiners.solvers.solver import weigh, weight_table


class UniPC(DPMSolver):
    """UniPC-2 with B(h) = exp(h) - 1, on clean predictions (arXiv 2302.04867, algorithms 1 and 2, "bh2").

    Its predictor is DPM-Solver++(2M). Its corrector redoes the last step as if the clean prediction had been, along the
    way, a polynomial through the predictions at both ends and (from the third step on) at the step before.
    It remembers the corrected x, the last clean prediction and the one before that.
    """

    takes_sde_variance: ClassVar[bool] = False

    def _is_first_order(self, step: int) -> bool:
        return step <= self.first_inference_step or step == self.num_inference_steps - 1

    def _lay_weights(self) -> None:
        super()._lay_weights()
        self._corrector_weights = weight_table(self._correction(step) for step in range(self.num_inference_steps))

    def _correction(self, step: int) -> list[float]:
        """Weights of the clean prediction at `step`, the corrected x before, and the two clean predictions before."""
        age = step - self.first_inference_step
        if age < 1:
            return [0.0, 0.0, 0.0, 0.0]
        start, goal = self.levels[step - 1], self.levels[step]
        of_x, of_clean, _ = first_order_weights(start, goal, 0.0)
        new, old = (0.5, 0.0) if age == 1 else second_order_correction(self.levels[step - 2], start, goal)
        return [of_clean * new, of_x, of_clean * (1 - new - old), of_clean * old]

    def _advance(self, x: Tensor, clean: Tensor, step: int) -> Tensor:
        corrected = weigh(self._corrector_weights[step], (clean, *self._memory)) if self._memory else x
        last_clean = self._memory[1:2]
        self._memory = (corrected, clean, *last_clean)
        return weigh(self._step_weights[step], self._memory)


def second_order_correction(before: Level, start: Level, goal: Level) -> tuple[float, float]:
    """Shares of the clean predictions at `goal` and `before`; what is missing to 1 falls to the one at `start`.

    They integrate a parabola through the three exactly, against the exponential weight that a step of length h in log
    signal-to-noise gives it (the paper's eq. 5, in closed form).
    """
    h = log(start.ratio / goal.ratio)
    position = -log(before.ratio / start.ratio) / h  # of `before`, where `start` is 0 and `goal` 1
    mean = 1 / -expm1(-h) - 1 / h
    mean_square = 1 / -expm1(-h) - 2 * mean / h
    return (mean_square - position * mean) / (1 - position), (mean_square - mean) / (position * (position - 1))
