"""Perturbed-attention guidance (arXiv 2403.17377): away from a picture whose positions do not see one another."""

from collections.abc import Sequence
from math import inf

from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.adapters.adapter import Adapter
from refiners.fluxion.context import Contexts
from refiners.foundationals.latent_diffusion.guidance import Prediction
from refiners.foundationals.latent_diffusion.model import LatentDiffusionModel
from refiners.foundationals.latent_diffusion.steering.self_attentions import self_attentions
from refiners.foundationals.latent_diffusion.steering.steered_guidance import SteeredGuidance
from refiners.foundationals.latent_diffusion.unet import unet_of

CONTEXT = "perturbed_attention"


class PerturbedAttentionGuidance(SteeredGuidance):
    """Leads to sounder structure, with and without classifier-free guidance.

    layers: patterns of diffusers' names of self-attentions, such as "mid", "down_blocks.2" or "up.*attentions.0"; one
        or several.
    adaptive_scale: how much less the scale is for each training step (of 1000) towards the clean picture; it ends at 0.
    scale, start, end: see `SteeredGuidance`.
    Raises ValueError for no patterns or one that matches none, and as `SteeredGuidance`.
    """

    def __init__(
        self,
        model: LatentDiffusionModel,
        scale: float = 3.0,
        layers: str | Sequence[str] = "mid",
        adaptive_scale: float = 0.0,
        start: float = 0.0,
        end: float = 1.0,
    ) -> None:
        if not 0 <= adaptive_scale < inf:
            raise ValueError(f"adaptive_scale is {adaptive_scale}, but should be a finite number, 0 (constant) or more")
        places = self_attentions(unet_of(model), layers)
        adapters = [(PerturbedAttention(place.product), place.attention) for place in places]
        super().__init__(model, adapters, scale, start, end)
        self.adaptive_scale = adaptive_scale

    def scale_at(self, step: int) -> Tensor:
        """`scale` at the noisiest, less of it towards the clean picture, 0 and more: ()."""
        solver = self.model.solver
        done = solver.params.num_train_timesteps - solver.timesteps[step]
        return (self._scale - self.adaptive_scale * done).clamp(min=0)

    def improvement(self, prediction: Prediction) -> Tensor:
        """From the prediction with perturbed attention to that without, for the prompts."""
        perturbed = prediction.again_positive(prediction.x, {CONTEXT: {"is_perturbed": True}})
        return prediction.positive - perturbed


class PerturbedAttention(fl.Chain, Adapter[fl.ScaledDotProductAttention]):
    """While asked to, gives each position its own value, as if attention were the identity."""

    def __init__(self, target: fl.ScaledDotProductAttention) -> None:
        with self.setup_adapter(target):
            super().__init__(target)

    def init_context(self) -> Contexts:
        return {CONTEXT: {"is_perturbed": False}}

    def forward(self, *inputs: Tensor) -> Tensor:
        query, _, value = inputs
        if self.use_context(CONTEXT)["is_perturbed"]:
            return value[:, -query.shape[1] :]  # other adapters put what else there is to see before its own
        return super().forward(*inputs)
