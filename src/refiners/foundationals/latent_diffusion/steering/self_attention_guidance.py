"""Self-attention guidance (arXiv 2210.00939): away from a picture that is blurred where the model looks most."""

from typing import cast

import torch
from torch import Size, Tensor
from torch.nn import functional

import refiners.fluxion.layers as fl
from refiners.adapters.adapter import Adapter
from refiners.fluxion.context import Contexts
from refiners.fluxion.utils import gaussian_blur, gaussian_weights
from refiners.foundationals.latent_diffusion.guidance import Prediction
from refiners.foundationals.latent_diffusion.model import LatentDiffusionModel
from refiners.foundationals.latent_diffusion.steering.self_attentions import self_attentions
from refiners.foundationals.latent_diffusion.steering.steered_guidance import SteeredGuidance
from refiners.foundationals.latent_diffusion.unet import unet_of


class SelfAttentionGuidance(SteeredGuidance):
    """Leads to finer detail, with and without classifier-free guidance.

    kernel_size, sigma: of the Gaussian blur, in latents; the size is odd.
    scale, start, end: see `SteeredGuidance`.
    Raises ValueError for another kernel_size or a sigma that is not positive, and as `SteeredGuidance`.
    """

    def __init__(
        self,
        model: LatentDiffusionModel,
        scale: float = 0.75,
        kernel_size: int = 9,
        sigma: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
    ) -> None:
        gaussian_weights(kernel_size, sigma)  # raises if there are none
        place = self_attentions(unet_of(model), "mid_block")[0]
        super().__init__(model, [(ObservedAttention(place.product), place.attention)], scale, start, end)
        self.kernel_size = kernel_size
        self.sigma = sigma

    def improvement(self, prediction: Prediction) -> Tensor:
        """From the prediction for degraded latents to that for the latents, for the negative prompts if there are."""
        ((observed, _),) = self._adapters
        attention = cast(ObservedAttention, observed).take()
        degraded = self.degrade(prediction.x, prediction.unguided, prediction.step, attention)
        return prediction.unguided - prediction.again_unguided(degraded)

    def degrade(self, x: Tensor, predicted: Tensor, step: int, attention: Tensor) -> Tensor:
        """Latents at the same level of noise, with the clean ones blurred where they are attended to most.

        attention: (B, 1, h', w'), how much each position is attended to; 1 is the mean.
        Raises ValueError if it is that of a part of the latents.
        """
        solver, levels = self.model.solver, len(self.model.unet.spec.channels)
        whole = torch.Size(-(-side // 2 ** (levels - 1)) for side in x.shape[2:])  # each halving rounds up
        if attention.shape[2:] != whole:
            raise ValueError(
                f"self-attention guidance saw {tuple(attention.shape[2:])} positions, but the picture has "
                f"{tuple(whole)}: it does not go with MultiDiffusion, whose windows see parts"
            )
        clean = solver.predict_clean(x, predicted, step)
        is_blurred = functional.interpolate((attention > 1).to(x), size=x.shape[2:])
        change = is_blurred * (gaussian_blur(clean, self.kernel_size, self.sigma) - clean)
        return x + solver.add_noise(change, torch.zeros_like(x), step)  # the same noise, so only the signal changes


class ObservedAttention(fl.Chain, Adapter[fl.ScaledDotProductAttention]):
    """Keeps how much each position is attended to, unless it is a guidance that runs the UNet."""

    def __init__(self, target: fl.ScaledDotProductAttention) -> None:
        self._attention: Tensor | None = None
        with self.setup_adapter(target):
            super().__init__(target)

    def take(self) -> Tensor:
        """What was kept, as (B, 1, h, w); the batch is that of the negative prompts, if there are any."""
        attention = self._attention
        assert attention is not None, "the UNet ran before it is asked"
        self.__dict__["_attention"] = None
        return attention

    def init_context(self) -> Contexts:
        return {"guidance": {"is_again": False}}

    def forward(self, *inputs: Tensor) -> Tensor:
        if not self.use_context("guidance")["is_again"]:
            query, key, _ = inputs
            count = self.use_context("diffusion").get("negatives", 0) or len(query)
            self.__dict__["_attention"] = self._attended(query[:count].detach(), key[:count].detach())
        return super().forward(*inputs)

    def _attended(self, query: Tensor, key: Tensor) -> Tensor:
        """The sum over all queries, and the mean over the heads, of the attention to each position: 1 on average."""
        own = key[:, -query.shape[1] :]  # other adapters put what else there is to see before them
        q, k = self.target._split_heads(query.float()), self.target._split_heads(own.float())
        attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=1).sum(dim=1)
        height_width: Size = self.use_context("flatten")["sizes"][-1]
        return torch.unflatten(attention[:, None], -1, height_width)
