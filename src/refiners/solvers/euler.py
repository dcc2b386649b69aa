"""The first-order solvers of k-diffusion, on x = clean + ratio * noise: Euler and Euler ancestral."""

from typing import ClassVar

from refiners.solvers.grid import BY_RATIO, Convention
from refiners.solvers.params import TimestepSpacing
from refiners.solvers.solver import Solver


class Euler(Solver):
    """Euler's method on the probability flow ODE (arXiv 2206.00364, algorithm 1 without its corrections).

    It takes the steps of DDIM, but counts x in units of the signal: x starts large, and `scale_model_input` is needed.
    """

    convention: ClassVar[Convention] = BY_RATIO
    default_spacing: ClassVar[TimestepSpacing] = TimestepSpacing.LINSPACE
    has_unit_variance: ClassVar[bool] = False


class EulerAncestral(Euler):
    """Euler's method down to less noise than the next level has, then fresh noise up to that level.

    `params.sde_variance` is the eta of k-diffusion, 1 unless given.
    """

    default_sde_variance: ClassVar[float] = 1.0
