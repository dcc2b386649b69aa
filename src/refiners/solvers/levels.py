"""One noise level, and the algebra of going from one to another. All floats are Python's (float64).

Every sampler here is linear in its tensors, so a step is a few weights. Two scales of x are in use: of unit variance
(signal² + noise² = 1, as in training), and of unit signal (signal = 1), in which x grows with the noise.
"""

from dataclasses import dataclass
from math import hypot, inf, log, sqrt

from refiners.solvers.params import ModelPredictionType


@dataclass(frozen=True)
class Level:
    """x = signal * clean + noise * epsilon, with epsilon of unit variance."""

    signal: float
    noise: float

    @classmethod
    def of_unit_variance(cls, ratio: float) -> "Level":
        """The level with this ratio of noise to signal, from 0 (clean) to inf (no signal)."""
        signal = 1 / hypot(1, ratio)
        return cls(signal, ratio * signal if signal else 1.0)

    @classmethod
    def of_unit_signal(cls, ratio: float) -> "Level":
        """The level with this ratio of noise to signal, 0 (clean) or more, but finite."""
        return cls(1.0, ratio)

    @property
    def ratio(self) -> float:
        """Noise to signal, inf without signal."""
        return self.noise / self.signal if self.signal else inf

    @property
    def size(self) -> float:
        """Standard deviation of x where the clean samples have unit variance."""
        return hypot(self.signal, self.noise)


def clean_weights(level: Level, prediction: ModelPredictionType) -> tuple[float, float]:
    """Weights of x and of the model's output that add up to the predicted clean sample.

    Noise: arXiv 2006.11239, eq. 15. Velocity: arXiv 2202.00512, appendix D; its x has unit variance, hence the sizes.
    Infinite for noise at a level without signal, where the noise tells nothing about the clean sample.
    """
    if prediction == ModelPredictionType.SAMPLE:
        return 0.0, 1.0
    if prediction == ModelPredictionType.VELOCITY:
        return level.signal / level.size**2, -level.noise / level.size
    return (1 / level.signal, -level.noise / level.signal) if level.signal else (inf, -inf)


def first_order_weights(start: Level, goal: Level, sde_variance: float) -> tuple[float, float, float]:
    """Weights of x, the clean prediction and fresh noise that lead from `start` to `goal`.

    This is DDIM with eta = sde_variance (arXiv 2010.02502, eq. 12 and 16). At 0 it is also Euler's method on the
    probability flow ODE, and DPM-Solver++(1); at 1 it is also the ancestral step of DDPM, with the smaller of its two
    variances, and SDE-DPM-Solver++(1).
    """
    shrinkage = goal.ratio / start.ratio
    fresh = sde_variance * goal.noise * sqrt(max(1 - shrinkage**2, 0.0))
    of_x = sqrt(goal.noise**2 - fresh**2) / start.noise
    return of_x, goal.signal - of_x * start.signal, fresh


def extrapolation(before: Level, start: Level, goal: Level) -> float:
    """How much of the last change of the clean prediction to add again, for a second-order step (arXiv 2211.01095).

    It is 1 / 2r in algorithm 2: half the step to come over the step just made, both in log signal-to-noise.
    """
    return log(start.ratio / goal.ratio) / log(before.ratio / start.ratio) / 2
