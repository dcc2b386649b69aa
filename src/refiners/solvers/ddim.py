"""The first-order solvers on the training schedule's own levels: DDPM and DDIM. They differ in their fresh noise."""

from typing import ClassVar

from refiners.solvers.solver import Solver


class DDPM(Solver):
    """Ancestral sampling (arXiv 2006.11239, algorithm 2), with the smaller of its two variances.

    By default 1000 steps visit every training timestep, so it also serves to add noise in training.
    """

    default_offset: ClassVar[int] = 0
    default_sde_variance: ClassVar[float] = 1.0


class DDIM(Solver):
    """DDIM (arXiv 2010.02502, eq. 12). Its eta is `params.sde_variance`, 0 by default."""
