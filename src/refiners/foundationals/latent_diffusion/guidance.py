"""What may be added to a prediction besides classifier-free guidance: a rule that is asked at every step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """What the UNet has predicted at a step, and how to ask it again.

    x: (B, C, h, w), the latents at the level of `step`.
    negative, positive: (B, C, h, w), for the negative prompts and for the prompts; negative is None without guidance.
    conditions: what the UNet was given: of batch 2 B, negative ones first; of batch B without guidance.
    run_unet: predicts for latents, a step, and conditions of the same batch.
    """

    x: Tensor
    step: int
    negative: Tensor | None
    positive: Tensor
    conditions: Mapping[str, Tensor]
    run_unet: Callable[[Tensor, int, Mapping[str, Tensor]], Tensor]

    @property
    def positive_conditions(self) -> dict[str, Tensor]:
        """Those of the prompts, of batch B."""
        size = self.x.shape[0]
        return {name: condition[-size:] for name, condition in self.conditions.items()}

    @property
    def negative_conditions(self) -> dict[str, Tensor]:
        """Those of the negative prompts, of batch B; without guidance, those of the prompts."""
        size = self.x.shape[0]
        return {name: condition[:size] for name, condition in self.conditions.items()}


class Guidance(Protocol):
    """What is to be added to the guided prediction: (B, C, h, w)."""

    def __call__(self, prediction: Prediction) -> Tensor: ...
