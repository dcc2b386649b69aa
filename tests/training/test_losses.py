"""Diffusion losses against diffusers' schedulers and the papers' formulas."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from refiners.solvers import ModelPredictionType, NoiseSchedule, SolverParams
from refiners.training import DiffusionLoss
from refiners.training.losses import draw_noise

SCHEDULES = {
    "scaled linear": SolverParams(),
    "linear": SolverParams(noise_schedule=NoiseSchedule.UNIFORM),
    "cosine": SolverParams(noise_schedule=NoiseSchedule.COSINE),
    "zero terminal SNR": SolverParams(
        rescale_to_zero_terminal_snr=True, model_prediction_type=ModelPredictionType.VELOCITY
    ),
}
TIMESTEPS = torch.tensor([0, 17, 500, 999])


def theirs(params: SolverParams) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=params.initial_diffusion_rate,
        beta_end=params.final_diffusion_rate,
        beta_schedule=str(params.noise_schedule),
        prediction_type=str(params.model_prediction_type),
        rescale_betas_zero_snr=params.rescale_to_zero_terminal_snr,
    )


@pytest.mark.parametrize("params", SCHEDULES.values(), ids=SCHEDULES)
def test_noise_and_targets_equal_diffusers(params: SolverParams) -> None:
    loss, scheduler = DiffusionLoss(params), theirs(params)
    latents, noise = torch.randn(4, 4, 3, 5), torch.randn(4, 4, 3, 5)
    expected = scheduler.add_noise(latents, noise, TIMESTEPS)
    torch.testing.assert_close(loss.add_noise(latents, noise, TIMESTEPS), expected, rtol=1e-4, atol=5e-5)
    velocity = DiffusionLoss(SolverParams(model_prediction_type=ModelPredictionType.VELOCITY))
    wanted = theirs(velocity.params).get_velocity(latents, noise, TIMESTEPS)
    torch.testing.assert_close(velocity.target(latents, noise, TIMESTEPS), wanted, rtol=1e-4, atol=5e-5)


def test_targets_are_what_the_model_predicts() -> None:
    latents, noise = torch.randn(4, 4, 3, 5), torch.randn(4, 4, 3, 5)
    sample = DiffusionLoss(SolverParams(model_prediction_type=ModelPredictionType.SAMPLE))
    assert DiffusionLoss().target(latents, noise, TIMESTEPS) is noise
    assert sample.target(latents, noise, TIMESTEPS) is latents


@pytest.mark.parametrize("prediction", list(ModelPredictionType))
def test_min_snr_weights_are_those_of_the_paper(prediction: ModelPredictionType) -> None:
    params = SolverParams(model_prediction_type=prediction)
    ratios = compute_snr(theirs(params), TIMESTEPS)
    bounded = ratios.clamp(max=5)
    divisor = {"epsilon": ratios, "v_prediction": ratios + 1, "sample": torch.ones(4)}[str(prediction)]
    torch.testing.assert_close(DiffusionLoss(params, 5.0).weights(TIMESTEPS), bounded / divisor, rtol=1e-3, atol=1e-5)
    assert torch.equal(DiffusionLoss(params).weights(TIMESTEPS), torch.ones(4))


def test_weights_are_finite_without_any_signal() -> None:
    assert torch.isfinite(DiffusionLoss(SCHEDULES["zero terminal SNR"], 5.0).weights(TIMESTEPS)).all()
    with pytest.raises(ValueError, match='set prediction_type = "v_prediction"'):
        DiffusionLoss(SolverParams(rescale_to_zero_terminal_snr=True))


def test_a_mask_counts_what_it_shows() -> None:
    predicted, wanted = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    mask = torch.zeros(2, 1, 6, 6)
    mask[0, :, :2] = 1
    losses = DiffusionLoss()(predicted, wanted, TIMESTEPS[:2], mask)
    torch.testing.assert_close(losses[0], (predicted - wanted)[0, :, :2].square().mean())
    assert losses[1] == 0
    torch.testing.assert_close(
        DiffusionLoss()(predicted, wanted, TIMESTEPS[:2], torch.full_like(mask, 0.5)),
        DiffusionLoss()(predicted, wanted, TIMESTEPS[:2]),
    )


def test_offset_noise_moves_whole_channels() -> None:
    noises = torch.stack(
        [draw_noise(torch.Size([4, 16, 16]), 0.5, torch.Generator().manual_seed(k)) for k in range(300)]
    )
    means = noises.mean((2, 3))
    assert means.std().item() == pytest.approx((0.25 + 1 / 256) ** 0.5, rel=0.1)
    plain = draw_noise(torch.Size([4, 16, 16]), 0.0, torch.Generator().manual_seed(0))
    rest = noises[0] - plain
    torch.testing.assert_close(rest, rest[:, :1, :1].expand_as(rest), rtol=0, atol=1e-5)
