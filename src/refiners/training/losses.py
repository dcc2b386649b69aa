"""The loss of diffusion models: how far a prediction is from what it should be, weighted over the noise levels.

- Epsilon and v prediction: arXiv 2006.11239, eq. 14; arXiv 2202.00512, appendix D.
- Min-SNR weights: arXiv 2303.09556, section 3.4, and its appendix for v.
- Offset noise: N. Guttenberg, "Diffusion with Offset Noise", 2023: some of the noise is the same over all of a picture.
- Zero terminal signal-to-noise ratio: arXiv 2305.08891, algorithm 1 (`SolverParams.rescale_to_zero_terminal_snr`).
"""

import torch
from torch import Tensor

from refiners.solvers import ModelPredictionType, SolverParams
from refiners.solvers.schedule import signal_powers


class DiffusionLoss:
    """Adds noise, says what the model should predict, and compares.

    params: the schedule, and what the model predicts.
    min_snr_gamma: bound of the weight of clean levels, 5 in the paper; None weighs all levels alike.
    Raises ValueError if noise should be predicted where there is nothing else.
    """

    def __init__(self, params: SolverParams | None = None, min_snr_gamma: float | None = None) -> None:
        self.params = params or SolverParams()
        self.prediction = self.params.model_prediction_type
        self.min_snr_gamma = min_snr_gamma
        if self.params.rescale_to_zero_terminal_snr and self.prediction == ModelPredictionType.NOISE:
            raise ValueError(
                "with zero terminal SNR the last timestep is noise alone, so that predicting noise teaches nothing; "
                'set prediction_type = "v_prediction"'
            )
        self._powers = torch.tensor(signal_powers(self.params).tolist(), dtype=torch.float64, device="cpu")

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents (B, …) at the noise level of each timestep, (B,) (arXiv 2006.11239, eq. 4)."""
        signal, level = self._levels(timesteps, latents)
        return signal * latents + level * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict."""
        if self.prediction == ModelPredictionType.NOISE:
            return noise
        if self.prediction == ModelPredictionType.SAMPLE:
            return latents
        signal, level = self._levels(timesteps, latents)
        return signal * noise - level * latents

    def weights(self, timesteps: Tensor) -> Tensor:
        """What the loss of each sample is multiplied with, (B,), in float32."""
        if self.min_snr_gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        powers = self._powers.to(timesteps.device)[timesteps]
        ratios = powers / (1 - powers)
        bounded = ratios.clamp(max=self.min_snr_gamma)
        if self.prediction == ModelPredictionType.NOISE:
            bounded = bounded / ratios
        elif self.prediction == ModelPredictionType.VELOCITY:
            bounded = bounded / (ratios + 1)
        return bounded.float()

    def __call__(self, predicted: Tensor, wanted: Tensor, timesteps: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of each sample, (B,), in float32.

        mask: (B, 1, h, w), how much each place counts, 0 … 1; a sample's loss is the mean over what counts.
        """
        errors = (predicted.float() - wanted.float()).square()
        if mask is None:
            means = errors.flatten(1).mean(1)
        else:
            counted = mask.float().expand_as(errors).flatten(1)
            means = (errors.flatten(1) * counted).sum(1) / counted.sum(1).clamp(min=1e-6)
        return means * self.weights(timesteps)

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        powers = self._powers.to(timesteps.device)[timesteps].reshape(-1, *[1] * (like.ndim - 1))
        return powers.sqrt().to(like), (1 - powers).sqrt().to(like)


def draw_noise(shape: torch.Size, offset: float, generator: torch.Generator) -> Tensor:
    """Noise for one sample, (C, h, w), float32 on the CPU.

    offset: how much of it is the same over all of a channel.
    """
    noise = torch.randn(shape, generator=generator)
    return noise + offset * torch.randn((shape[0], 1, 1), generator=generator) if offset else noise
