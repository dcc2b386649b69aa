"""Guidance away from what a worse model would have predicted: what the ways to make it worse have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from copy import copy
from math import inf
from typing import Any, Self

import torch
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.adapters.adapter import Adapter
from refiners.fluxion.checks import instance_of
from refiners.fluxion.layers.transaction import record
from refiners.foundationals.latent_diffusion.copies import Twins
from refiners.foundationals.latent_diffusion.guidance import Prediction
from refiners.foundationals.latent_diffusion.model import LatentDiffusionModel
from refiners.foundationals.latent_diffusion.steering.steering import Steering


class SteeredGuidance(Steering, ABC):
    """Adds `scale` times the way from a worse prediction to a good one, which costs another run of the UNet.

    scale: 0 and more.
    start, end: shares of the steps; only a step that lies whole between them is guided, and others cost nothing.
    Raises ValueError if they do not satisfy 0 <= start < end <= 1, or for another scale, TypeError for no model.
    """

    def __init__(
        self,
        model: LatentDiffusionModel,
        adapters: Iterable[tuple[Adapter[Any], fl.Chain]],
        scale: float,
        start: float,
        end: float,
    ) -> None:
        if not 0 <= start < end <= 1:
            raise ValueError(f"start and end should be shares, 0 <= start < end <= 1, but they are {start} and {end}")
        super().__init__(adapters)
        self.model = instance_of(model, LatentDiffusionModel, "the model", "a whole one, not a part of it")
        self.start = start
        self.end = end
        self._scale = torch.tensor(_checked(scale))  # a tensor, so that a new scale needs no new compilation

    @property
    def scale(self) -> float:
        """How strong it is. What was compiled stays good."""
        return self._scale.item()

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale.fill_(_checked(value))

    def inject(self) -> Self:
        """Put the edit on the UNet and the rule among the model's guidances. Raises RuntimeError if it is there."""
        with fl.transaction():
            super().inject()
            self.model.guidances.append(self)
            record(lambda: self.model.guidances.remove(self))
        return self

    def eject(self) -> None:
        """Take both off again. Raises RuntimeError if they are not there."""
        with fl.transaction():
            super().eject()
            index = self.model.guidances.index(self)
            self.model.guidances.remove(self)
            record(lambda: self.model.guidances.insert(index, self))

    def copied(self, twins: Twins) -> Self:
        """The same for a copy of the model: injected there, with a scale of its own."""
        clone = copy(self)
        clone.model = twins[self.model]
        clone._adapters = tuple((twins[adapter], twins[place]) for adapter, place in self._adapters)
        clone._scale = self._scale.clone()
        return clone

    def __call__(self, prediction: Prediction) -> Tensor:
        """What is to be added to the prediction."""
        index, count = prediction.index, prediction.count
        if index / count < self.start or (index + 1) / count > self.end:
            return torch.zeros_like(prediction.positive)
        return self.scale_at(prediction.step).to(prediction.x) * self.improvement(prediction)

    def scale_at(self, step: int) -> Tensor:
        """How strong it is at a step: ()."""
        return self._scale

    @abstractmethod
    def improvement(self, prediction: Prediction) -> Tensor:
        """The way from a worse prediction to a good one: (B, C, h, w)."""


def _checked(scale: float) -> float:
    if not 0 <= scale < inf:
        raise ValueError(f"the scale of a guidance is {scale}, but should be a finite number, 0 (off) or more")
    return float(scale)
