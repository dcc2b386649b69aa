"""A running mean of the weights that train, often better than the last ones (as in arXiv 2006.11239, appendix B).

After step n the mean moves by 1 - d towards the weights, with d = min(decay, (1 + n) / (10 + n)): it forgets its
random beginnings at first (as in TensorFlow's ExponentialMovingAverage).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class RunningMean:
    """The mean of named weights; decay: in [0, 1), the nearer to 1 the longer it remembers."""

    def __init__(self, weights: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.means: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, nn.Parameter], step: int) -> None:
        """Take in the weights after step number `step`, 1 or more."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in weights.items():
            self.means[name].lerp_(weight.detach(), 1 - decay)
