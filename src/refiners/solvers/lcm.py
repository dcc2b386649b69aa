"""Latent consistency models: each evaluation goes all the way to a clean sample, then noise is added again."""

from math import hypot
from typing import ClassVar

import numpy as np
import torch

from refiners.fluxion.checks import whole_number
from refiners.solvers.grid import choose_timesteps
from refiners.solvers.params import SolverParams
from refiners.solvers.schedule import Array
from refiners.solvers.solver import Solver

DATA_DEVIATION = 0.5  # sigma_data of arXiv 2303.01469, appendix C
TIMESTEP_SCALING = 10.0  # of arXiv 2310.04378's released models


class LCM(Solver):
    """Multistep sampling of a latent consistency model (arXiv 2310.04378, algorithm 3).

    num_original_steps: of the solver that the model was distilled with; the steps are some of those. Hence neither
        spacing, offset nor sigma schedule can be chosen, but custom timesteps can.
    """

    default_sde_variance: ClassVar[float] = 1.0
    takes_sde_variance: ClassVar[bool] = False

    def __init__(
        self,
        num_inference_steps: int,
        first_inference_step: int = 0,
        params: SolverParams | None = None,
        num_original_steps: int = 50,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.num_original_steps = whole_number(num_original_steps, "num_original_steps")
        super().__init__(num_inference_steps, first_inference_step, params=params, device=device, dtype=dtype)

    def _choose_timesteps(self, count: int) -> Array:
        params = self.params
        if params.custom_timesteps is not None:
            return choose_timesteps(self.convention, params, count, self.spacing, self.default_offset)
        if params.timesteps_spacing or params.timesteps_offset or params.sigma_schedule:
            raise ValueError(
                f"LCM takes its timesteps from those it was distilled with, but params ask for spacing "
                f"{params.timesteps_spacing}, offset {params.timesteps_offset} and sigma schedule "
                f"{params.sigma_schedule}; leave them out, or give custom_timesteps"
            )
        originals = self.num_original_steps
        if not count <= originals <= params.num_train_timesteps:
            raise ValueError(
                f"LCM chooses its {count} steps among num_original_steps={originals}, and those among "
                f"{params.num_train_timesteps} training timesteps; take fewer steps, or change num_original_steps"
            )
        all_timesteps = np.arange(originals, 0, -1) * (params.num_train_timesteps // originals) - 1
        chosen = np.floor(np.linspace(0, originals, count, endpoint=False)).astype(np.int64)
        return all_timesteps[chosen].astype(np.float64)

    def _weights(self, step: int) -> tuple[list[float], float]:
        # The model gives back x itself at timestep 0 (eq. 9: c_skip and c_out), and is scaled to do so elsewhere.
        time = TIMESTEP_SCALING * float(self.timesteps[step])
        size = hypot(time, DATA_DEVIATION)
        of_x, of_clean = (DATA_DEVIATION / size) ** 2, time / size
        if step == self.num_inference_steps - 1:
            return [of_x, of_clean], 0.0
        goal = self.levels[step + 1]
        return [goal.signal * of_x, goal.signal * of_clean], goal.noise
