"""Each part of the pretraining takes its steps, goes on from its checkpoint, and leaves what the next one needs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.foundationals.clip.tokenizer import CLIPTokenizer
from refiners.foundationals.latent_diffusion import LatentDiffusionAutoencoder
from refiners.foundationals.latent_diffusion.embedded import (
    EMBEDDED_AUTOENCODER,
    EMBEDDED_SOLVER_PARAMS,
    EMBEDDED_VOCABULARY,
    EMBEDDED_WEIGHTS,
    make_text_encoder,
)
from refiners.foundationals.latent_diffusion.files import pretrained
from refiners.foundationals.scenes import Reader, Split, draw_scenes, make_scenes
from refiners.solvers.schedule import signal_powers
from refiners.training.pretraining import __main__ as commands
from refiners.training.pretraining import autoencoder, diffusion, reader, text
from refiners.training.pretraining.diffusion import TextToLatents, velocity_loss
from refiners.training.pretraining.evaluation import held_out_captions
from refiners.training.pretraining.loop import Plan, Trainee, load_average, train
from refiners.training.pretraining.vocabulary import scene_words, write_vocabulary
from refiners.weights import read_header, read_metadata, read_safetensors

PLAN = Plan(steps=6, peak_rate=1e-2, warm_up=2, save_every=3, report_every=2)


def toy_loss(model: nn.Module, generator: torch.Generator) -> Tensor:
    x = torch.randn(8, 4, generator=generator)
    return (model(x) - x.flip(1)).square().mean()


def toy() -> fl.Chain:
    torch.manual_seed(0)
    return fl.Chain(fl.Linear(4, 8), fl.SiLU(), fl.Linear(8, 4))


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    whole.mkdir(), halved.mkdir()
    lines: list[str] = []
    first = toy()
    train("toy", first, PLAN, lambda generator: toy_loss(first, generator), whole, lines.append)
    interrupted, calls = toy(), iter(range(4))

    def failing_loss(generator: torch.Generator) -> Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return toy_loss(interrupted, generator)

    with pytest.raises(KeyboardInterrupt):
        train("toy", interrupted, PLAN, failing_loss, halved, lines.append)
    second = toy()
    train("toy", second, PLAN, lambda generator: toy_loss(second, generator), halved, lines.append)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert "toy 6: loss" in lines[-1]


def test_a_run_that_ended_goes_on_if_there_are_more_steps(tmp_path: Path) -> None:
    model = toy()
    train("toy", model, PLAN, lambda generator: toy_loss(model, generator), tmp_path, lambda line: None)
    losses: list[float] = []

    def loss_of(generator: torch.Generator) -> Tensor:
        loss = toy_loss(model, generator)
        losses.append(loss.item())
        return loss

    train("toy", model, replace(PLAN, steps=10), loss_of, tmp_path, lambda line: None)
    assert len(losses) == 4


def test_the_average_is_what_is_kept(tmp_path: Path) -> None:
    model = toy()
    trainee = Trainee(model, PLAN)
    for seed in range(4):
        trainee.learn(toy_loss(model, torch.Generator().manual_seed(seed)))
    trainee.save(tmp_path / "toy.safetensors")
    other = toy()
    load_average(other, tmp_path / "toy.safetensors")
    for (name, value), last in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(value, trainee.average[name]) and not torch.equal(value, last)


@pytest.mark.parametrize("step", [4, 5])
def test_a_gradient_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(tmp_path: Path, step: int) -> None:
    model = toy()

    def loss_of(generator: torch.Generator) -> Tensor:
        loss = toy_loss(model, generator)
        return loss + (loss * 0).sqrt() if generator.initial_seed() == step else loss  # finite; its gradient is not

    with pytest.raises(FloatingPointError, match="2 steps up to 6 is not finite"):
        train("toy", model, PLAN, loss_of, tmp_path, lambda line: None)
    kept = read_safetensors(tmp_path / "toy.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert read_metadata(tmp_path / "toy.safetensors") == {"step": "3"}


def test_rates_rise_stay_and_fall_to_almost_nothing() -> None:
    plan = Plan(steps=100, peak_rate=1.0, warm_up=10, decay=0.5)
    assert [plan.rate(0), plan.rate(9), plan.rate(50), plan.rate(75), plan.rate(99)] == [0.1, 1.0, 1.0, 0.5, 0.02]


def test_words_that_adapters_teach_do_not_fade() -> None:
    encoder = make_text_encoder()
    trainee = Trainee(encoder, PLAN)
    word = encoder.ensure_find(CLIPTokenizer).encode("heart")[1]
    table = trainee.parameters["Sum.TokenEncoder.weight"]
    before = table.detach().clone()
    trainee.learn(encoder("a red circle")[:, :4].square().sum())
    assert torch.equal(table[word], before[word])
    assert not torch.equal(table, before)


@pytest.mark.slow
def test_the_reader_learns() -> None:
    torch.manual_seed(0)
    judge = Reader()
    trainee = Trainee(judge, Plan(steps=8, peak_rate=2e-3, warm_up=1))
    losses: list[float] = []
    for _ in range(8):
        loss = reader.reader_loss(judge, torch.Generator().manual_seed(0))
        trainee.learn(loss)
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_the_autoencoder_begins_near_its_shortcuts_and_learns() -> None:
    torch.manual_seed(0)
    lda = LatentDiffusionAutoencoder(EMBEDDED_AUTOENCODER)
    autoencoder.begin_as_identity(lda)
    trainee = Trainee(lda, Plan(steps=5, peak_rate=2e-3, warm_up=1))
    losses: list[float] = []
    for _ in range(5):
        loss = autoencoder.autoencoder_loss(lda, torch.Generator().manual_seed(0))
        trainee.learn(loss)
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_normalised_latents_have_unit_variance_and_the_same_pictures() -> None:
    torch.manual_seed(0)
    lda = LatentDiffusionAutoencoder(EMBEDDED_AUTOENCODER)
    generator = torch.Generator().manual_seed(8)
    images = draw_scenes(make_scenes(128, generator), generator)
    with torch.no_grad():
        before, spread = lda(images), lda.Encoder(images).chunk(2, 1)[1]
        deviation = lda.encode(images).std((0, 2, 3))
        autoencoder.normalise_latents(lda, count=128)
        latents, after = lda.encode(images), lda(images)
        new_spread = lda.Encoder(images).chunk(2, 1)[1]
    assert torch.allclose(before, after, atol=1e-4)
    assert latents.mean((0, 2, 3)).abs().max() < 0.1
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.1
    ratio = (new_spread - spread).mean((0, 2, 3)) + 2 * deviation.log()
    assert ratio.abs().max() < 0.2  # the variance that the encoder tells is that of the new latents


@pytest.mark.slow
def test_the_text_encoder_learns_from_captions() -> None:
    torch.manual_seed(0)
    encoder = make_text_encoder()
    text.begin_small(encoder)
    whole = fl.Chain(encoder, text.Places(encoder.spec))
    trainee = Trainee(whole, Plan(steps=5, peak_rate=1e-3, warm_up=1))
    losses: list[float] = []
    for _ in range(5):
        loss = text.text_loss(whole, torch.Generator().manual_seed(0))
        trainee.learn(loss)
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_one_step_of_diffusion_changes_both_parts_and_a_perfect_prediction_costs_nothing() -> None:
    model = TextToLatents(diffusion.new_unet(), make_text_encoder())
    powers = torch.tensor(signal_powers(EMBEDDED_SOLVER_PARAMS), dtype=torch.float32)
    latents = torch.randn(4, 4, 8, 8)
    token_ids = model.clip_text_encoder.ensure_find(CLIPTokenizer)([*held_out_captions(3), ""])
    trainee = Trainee(model, Plan(steps=3, peak_rate=1e-3, warm_up=1))
    before = [value.detach().clone() for value in model.parameters()]
    for step in range(3):
        trainee.learn(velocity_loss(model, latents, token_ids, powers, torch.Generator().manual_seed(step)))
    has_changed = [not torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True)]
    assert all(has_changed)

    class Oracle(nn.Module):
        def forward(self, noisy: Tensor, timesteps: Tensor, token_ids: Tensor) -> Tensor:
            power = powers[timesteps, None, None, None]
            noise = (noisy - power.sqrt() * latents) / (1 - power).sqrt()
            return power.sqrt() * noise - (1 - power).sqrt() * latents

    perfect: float = velocity_loss(Oracle(), latents, token_ids, powers, torch.Generator()).item()
    assert perfect < 1e-6


@pytest.mark.slow
def test_examples_are_cached_and_their_captions_are_of_their_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusion, "CHUNK", 6)
    lda = LatentDiffusionAutoencoder(EMBEDDED_AUTOENCODER)
    path = tmp_path / "examples.safetensors"
    made = diffusion.cached_examples(lda, path, count=10)
    written = path.stat().st_mtime_ns
    again = diffusion.cached_examples(lda, path, count=10)
    assert path.stat().st_mtime_ns == written
    assert all(torch.equal(one, other) for one, other in zip(vars(made).values(), vars(again).values(), strict=True))
    others = diffusion.cached_examples(LatentDiffusionAutoencoder(EMBEDDED_AUTOENCODER), path, count=10)
    assert not torch.equal(made.latents, others.latents) and torch.equal(made.token_ids, others.token_ids)

    scenes = make_scenes(6, torch.Generator().manual_seed(0), Split.TRAIN)
    images = draw_scenes(scenes, torch.Generator().manual_seed(0))
    assert torch.equal(others.chances[:6], scenes.is_there.sum(1).float())
    tokenizer = CLIPTokenizer(EMBEDDED_VOCABULARY, sequence_length=32)
    for row, scene in enumerate(scenes.to_list()):
        words = {id for thing in scene.things for id in tokenizer.encode(str(thing))}
        assert all(words <= set(ids.tolist()) for ids in others.token_ids[row])
    with torch.no_grad():
        assert torch.equal(diffusion.cached_examples(lda, path, count=10).latents[:6], lda.encode(images).half())


def test_a_share_of_the_captions_that_are_drawn_is_empty() -> None:
    empty = torch.zeros(3, dtype=torch.int16)
    token_ids = torch.arange(1, 25, dtype=torch.int16).reshape(4, 2, 3)
    chances = torch.tensor([1.0, 0.0, 1.0, 3.0])
    examples = diffusion.Examples(torch.arange(4.0).half().reshape(4, 1, 1, 1), token_ids, chances, empty)
    latents, drawn = examples.draw(4000, torch.Generator().manual_seed(0))
    rows = latents.flatten().long()
    assert abs((rows == 3).float().mean() - 0.6) < 0.03 and not (rows == 1).any()
    is_empty = (drawn == 0).all(1)
    assert abs(is_empty.float().mean() - diffusion.CAPTION_DROPOUT) < 0.02
    assert torch.equal((drawn[~is_empty][:, 0] - 1) // 6, rows[~is_empty])


def test_the_vocabulary_in_the_package_is_what_the_script_writes(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "vocabulary.txt")
    assert (tmp_path / "vocabulary.txt").read_bytes() == EMBEDDED_VOCABULARY.read_bytes()


@pytest.mark.slow
def test_all_parts_run_one_after_the_other_and_go_on_from_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("EMBEDDED_WEIGHTS", "READER_WEIGHTS", "EMBEDDED_VOCABULARY"):
        monkeypatch.setattr(commands, name, tmp_path / name)
    monkeypatch.setattr(pretrained, "EMBEDDED_WEIGHTS", tmp_path / "EMBEDDED_WEIGHTS")
    monkeypatch.setattr(diffusion, "SCENE_COUNT", 64)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    for part in ("vocabulary", "reader", "autoencoder", "text", "diffusion", "export"):
        commands.run(part, first, steps=1, count=2, from_package=False)
    before = read_safetensors(tmp_path / "EMBEDDED_WEIGHTS")
    assert set(before) == set(read_header(EMBEDDED_WEIGHTS).tensors)
    for part in ("diffusion", "export", "evaluate"):
        commands.run(part, second, steps=2, count=2, from_package=True)
    after = read_safetensors(tmp_path / "EMBEDDED_WEIGHTS")
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {
        "unet",
        "clip_text_encoder",
    }
    assert "2 pictures" in (second / "progress.md").read_text()


def test_words_are_cut_as_by_the_whole_vocabulary() -> None:
    small, whole = CLIPTokenizer(EMBEDDED_VOCABULARY), CLIPTokenizer()
    for word in scene_words():
        assert [piece.start for piece in small.pieces(word)] == [piece.start for piece in whole.pieces(word)]
    assert len(small.pieces("a red circle above a blue square, under sks")) == 10
