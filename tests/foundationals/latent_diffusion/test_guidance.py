"""What a model tells its guidances and the modules of its UNet before and at each step."""

import copy
from typing import Any

import pytest
import torch
from diffusion_specimens import small_model
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.adapters import Adapter
from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.guidance import Prediction
from refiners.foundationals.latent_diffusion.participant import Participant
from refiners.foundationals.latent_diffusion.unet import DownBlocks
from refiners.solvers import DDIM

X, TEXT = torch.randn(2, 4, 8, 8), torch.randn(4, 77, 32)


@pytest.fixture(scope="module")
def shared() -> StableDiffusion_1:
    return small_model(solver=DDIM(5))


@pytest.fixture
def model(shared: StableDiffusion_1) -> Any:
    yield shared
    shared.guidances.clear()


class Kept:
    """A guidance that keeps what it was told and adds a number."""

    def __init__(self, added: float = 0.0) -> None:
        self.added = added
        self.predictions: list[Prediction] = []

    def __call__(self, prediction: Prediction) -> Tensor:
        self.predictions.append(prediction)
        return torch.full_like(prediction.x, self.added)


class Listening(fl.Chain, Participant, Adapter[DownBlocks]):
    """Keeps the steps that it was told of, and how many of each call were for negative prompts."""

    def __init__(self, target: DownBlocks) -> None:
        self.steps: list[tuple[int, int]] = []
        self.negatives: list[int] = []
        with self.setup_adapter(target):
            super().__init__(
                target, fl.Passthrough(fl.UseContext("diffusion", "negatives").compose(self.negatives.append))
            )

    def before_step(self, index: int, count: int) -> None:
        self.steps.append((index, count))


# -- guidances


@torch.no_grad()
def test_what_guidances_return_is_added_to_the_guided_prediction(model: StableDiffusion_1) -> None:
    plain = model.predict_noise(X, 2, TEXT, 5.0)
    model.guidances += [Kept(0.5), Kept(0.25)]
    assert torch.allclose(model.predict_noise(X, 2, TEXT, 5.0), plain + 0.75)


@torch.no_grad()
def test_a_guidance_is_told_of_the_step_and_can_ask_for_each_half_again(model: StableDiffusion_1) -> None:
    kept = Kept()
    model.guidances.append(kept)
    guided = model.predict_noise(X, 2, TEXT, 5.0)
    (prediction,) = kept.predictions
    assert (prediction.step, prediction.index, prediction.count) == (2, 2, 5)
    assert prediction.negative is not None and prediction.unguided is prediction.negative
    expected = prediction.negative + 5 * (prediction.positive - prediction.negative)
    assert torch.equal(guided, expected)
    assert torch.equal(prediction.conditions["clip_text_embedding"], TEXT)
    assert torch.allclose(prediction.again_positive(X), prediction.positive, atol=1e-5)
    assert torch.allclose(prediction.again_unguided(X), prediction.negative, atol=1e-5)
    assert not torch.allclose(prediction.negative, prediction.positive, atol=1e-2)


@torch.no_grad()
def test_without_classifier_free_guidance_there_is_no_negative(model: StableDiffusion_1) -> None:
    kept = Kept()
    model.guidances.append(kept)
    model.predict_noise(X, 2, TEXT, 1.0)
    (prediction,) = kept.predictions
    assert prediction.negative is None and prediction.unguided is prediction.positive
    assert torch.equal(prediction.conditions["clip_text_embedding"], TEXT[2:])
    assert torch.allclose(prediction.again_unguided(X), prediction.positive, atol=1e-5)


@torch.no_grad()
def test_the_index_is_that_among_the_steps_that_are_taken(model: StableDiffusion_1) -> None:
    kept, solver = Kept(), model.solver
    model.guidances.append(kept)
    model.set_inference_steps(5, first_step=2)
    for step in model.steps:
        model.predict_noise(X, step, TEXT)
    model.solver = solver
    assert [(each.step, each.index, each.count) for each in kept.predictions] == [(2, 0, 3), (3, 1, 3), (4, 2, 3)]


@torch.no_grad()
def test_contexts_of_a_further_run_are_gone_after_it(model: StableDiffusion_1) -> None:
    seen: list[Any] = []
    watch = fl.Passthrough(
        fl.SetContext("guidance", "seen", callback=lambda *_: seen.append(dict(model.unet.contexts)))
    )
    model.unet.insert(0, watch)
    model.run_unet(X, 2, {"clip_text_embedding": TEXT[:2]}, contexts={"mine": {"is_here": True}})
    model.run_unet(X, 2, {"clip_text_embedding": TEXT[:2]})
    model.unet.remove(watch)
    assert seen[0]["mine"] == {"is_here": True} and "mine" not in seen[1]


# -- participants


@torch.no_grad()
def test_modules_of_the_tree_are_told_of_each_step_while_they_are_in_it(model: StableDiffusion_1) -> None:
    assert model.unet.participants == ()
    listening = Listening(model.unet.DownBlocks).inject()
    assert model.unet.participants == (listening,)
    for step in model.steps[1:3]:
        model.predict_noise(X, step, TEXT)
    model.predict_noise(X, 3, TEXT, condition_scale=1.0)
    listening.eject()
    assert model.unet.participants == ()
    model.predict_noise(X, 4, TEXT)
    assert listening.steps == [(1, 5), (2, 5), (3, 5)]
    assert listening.negatives == [2, 2, 0]


def test_copies_have_participants_of_their_own(model: StableDiffusion_1) -> None:
    listening = Listening(model.unet.DownBlocks).inject()
    assert model.unet.participants == (listening,)
    for unet in (model.unet.structural_copy(), copy.deepcopy(model.unet)):
        assert unet.participants == (unet.DownBlocks,) and unet.DownBlocks is not listening
    listening.eject()


@torch.no_grad()
def test_further_runs_of_guidances_are_no_steps(model: StableDiffusion_1) -> None:
    listening = Listening(model.unet.DownBlocks).inject()
    model.guidances += [lambda prediction: prediction.again_positive(X) + prediction.again_unguided(X)]
    model.predict_noise(X, 0, TEXT)
    listening.eject()
    assert listening.steps == [(0, 5)] and listening.negatives == [2, 0, 2]


# -- conditions


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({}, "was given nothing"),
        ({"clip_text_embedding": TEXT, "time_ids": TEXT}, "was given clip_text_embedding, time_ids"),
        ({"text_embedding": TEXT}, "to be given clip_text_embedding, but was given text_embedding"),
    ],
)
def test_conditions_that_the_unet_does_not_read_or_lacks_are_refused(
    model: StableDiffusion_1, conditions: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.unet.set_conditions(conditions)


def test_a_condition_too_many_is_refused_before_the_unet_runs(model: StableDiffusion_1) -> None:
    with pytest.raises(ValueError, match="pooled_text_embedding"):
        model.predict_noise(X, 0, TEXT, pooled_text_embedding=torch.randn(2, 4))


def test_set_conditions_is_what_the_setters_are(model: StableDiffusion_1) -> None:
    timestep = torch.tensor([3, 3])
    model.unet.set_timestep(timestep)
    model.unet.set_conditions({"clip_text_embedding": TEXT[:2]})
    at_once = model.unet(X)
    model.unet.set_timestep(timestep)
    model.unet.set_clip_text_embedding(TEXT[:2])
    assert torch.equal(model.unet(X), at_once)
