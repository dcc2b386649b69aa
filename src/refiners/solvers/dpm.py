"""DPM-Solver++, of second order with one evaluation of the model a step, because it remembers the last one."""

from typing import ClassVar

from torch import Tensor

from refiners.solvers.grid import BY_LOG_RATIO, Convention
from refiners.solvers.levels import extrapolation, first_order_weights
from refiners.solvers.params import TimestepSpacing
from refiners.solvers.solver import Solver

FEW_STEPS = 15  # below, the last step is of first order, as in the authors' code


class DPMSolver(Solver):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2); with `params.sde_variance` 1, SDE-DPM-Solver++(2M).

    It is DDIM with the clean prediction extrapolated to the middle of the step. The first step, having nothing to
    extrapolate from, is of first order; so is the last one if it ends clean (an infinite step in log
    signal-to-noise) or if there are fewer than 15.
    """

    convention: ClassVar[Convention] = BY_LOG_RATIO
    default_spacing: ClassVar[TimestepSpacing] = TimestepSpacing.LINSPACE
    remembers: ClassVar[bool] = True

    def _is_first_order(self, step: int) -> bool:
        is_last = step == self.num_inference_steps - 1
        has_plain_end = self.params.ends_clean or self.num_inference_steps < FEW_STEPS
        return step <= self.first_inference_step or (is_last and has_plain_end)

    def _weights(self, step: int) -> tuple[list[float], float]:
        of_x, of_clean, of_noise = first_order_weights(self.levels[step], self.levels[step + 1], self.sde_variance)
        if self._is_first_order(step):
            return [of_x, of_clean, 0.0], of_noise
        more = of_clean * extrapolation(self.levels[step - 1], self.levels[step], self.levels[step + 1])
        return [of_x, of_clean + more, -more], of_noise

    def _remember(self, x: Tensor, clean: Tensor, step: int) -> tuple[Tensor, ...]:
        return (clean,)
