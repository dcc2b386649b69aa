"""What may be added to a prediction besides classifier-free guidance: a rule that is asked at every step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from refiners.fluxion.context import Context


class RunUNet(Protocol):
    """`LatentDiffusionModel.run_unet`."""

    def __call__(
        self,
        x: Tensor,
        step: int,
        conditions: Mapping[str, Tensor],
        negatives: int = 0,
        contexts: Mapping[str, Context] | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Prediction:
    """What the UNet has predicted at a step, and how to ask it again.

    x: (B, C, h, w), the latents at the level of `step`.
    index, count: which step it is, 0 … count - 1, of those that are taken.
    negative, positive: (B, C, h, w), for the negative prompts and for the prompts; negative is None without guidance.
    conditions: what the UNet was given: of batch 2 B, negative ones first; of batch B without guidance.
    """

    x: Tensor
    step: int
    index: int
    count: int
    negative: Tensor | None
    positive: Tensor
    conditions: Mapping[str, Tensor]
    run_unet: RunUNet

    @property
    def unguided(self) -> Tensor:
        """For the negative prompts, or without guidance for the prompts."""
        return self.positive if self.negative is None else self.negative

    def again_positive(self, x: Tensor, contexts: Mapping[str, Context] | None = None) -> Tensor:
        """What the UNet predicts for other latents, of batch B, and the prompts.

        contexts: what adapters are to find besides.
        """
        return self._again(x, slice(-len(x), None), 0, contexts)

    def again_unguided(self, x: Tensor, contexts: Mapping[str, Context] | None = None) -> Tensor:
        """As `again_positive`, for the negative prompts, or without guidance for the prompts."""
        return self._again(x, slice(len(x)), 0 if self.negative is None else len(x), contexts)

    def _again(self, x: Tensor, half: slice, negatives: int, contexts: Mapping[str, Context] | None) -> Tensor:
        conditions = {name: condition[half] for name, condition in self.conditions.items()}
        all_contexts = {"guidance": {"is_again": True}, **(contexts or {})}
        return self.run_unet(x, self.step, conditions, negatives, all_contexts)


class Guidance(Protocol):
    """What is to be added to the guided prediction: (B, C, h, w)."""

    def __call__(self, prediction: Prediction) -> Tensor: ...
