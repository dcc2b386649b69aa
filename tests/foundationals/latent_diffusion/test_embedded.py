"""The embedded model: its weights fit the classes, its UNet knows where it is, and its pictures obey captions."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from refiners.foundationals.latent_diffusion import LatentDiffusionAutoencoder, StableDiffusion_1, UNet
from refiners.foundationals.latent_diffusion.embedded import (
    EMBEDDED_AUTOENCODER,
    EMBEDDED_TEXT_ENCODER,
    EMBEDDED_UNET,
    EMBEDDED_VOCABULARY,
    EMBEDDED_WEIGHTS,
    make_text_encoder,
)
from refiners.foundationals.latent_diffusion.unet import Waves
from refiners.foundationals.latent_diffusion.unet_names import diffusers_names, single_file_names
from refiners.foundationals.scenes import Split
from refiners.training.pretraining.evaluation import evaluate
from refiners.weights import read_header


def test_the_weights_are_exactly_those_of_the_three_parts() -> None:
    parts = {
        "unet": UNet(EMBEDDED_UNET, device="meta"),
        "lda": LatentDiffusionAutoencoder(EMBEDDED_AUTOENCODER, device="meta"),
        "clip_text_encoder": make_text_encoder(),
    }
    expected = {
        f"{part}.{name}": tuple(value.shape)
        for part, model in parts.items()
        for name, value in model.state_dict().items()
    }
    tensors = read_header(EMBEDDED_WEIGHTS).tensors
    assert {name: info.shape for name, info in tensors.items()} == expected
    assert EMBEDDED_WEIGHTS.stat().st_size < 15e6


def test_the_vocabulary_is_as_large_as_the_spec_says() -> None:
    tokenizer = make_text_encoder().layer(0)
    assert tokenizer.vocabulary_size == EMBEDDED_TEXT_ENCODER.vocabulary_size
    assert EMBEDDED_VOCABULARY.read_text().startswith("#version")


def test_names_of_the_embedded_unet_invert_and_differ() -> None:
    keys = list(UNet(EMBEDDED_UNET, device="meta").state_dict())
    for names in (diffusers_names(EMBEDDED_UNET), single_file_names(EMBEDDED_UNET)):
        theirs = [str(names.to_theirs(key)) for key in keys]
        assert [names.to_ours(key) for key in theirs] == keys
        assert len(set(theirs)) == len(keys)


def test_waves_tell_every_position_apart_at_any_size() -> None:
    for size in ((8, 8), (5, 11)):
        waves = Waves(4)(torch.zeros(2, 3, *size))
        assert waves.shape == (2, 16, *size) and torch.equal(waves[0], waves[1])
        vectors = waves[0].flatten(1).T
        distances = torch.cdist(vectors, vectors) + 9 * torch.eye(len(vectors))
        assert distances.min() > 0.1
    assert torch.allclose(waves[0, 0, :, 0], torch.cos(torch.pi * (torch.arange(5) + 0.5) / 5), atol=1e-6)


def test_a_folder_gives_back_the_embedded_model(tmp_path: Path) -> None:
    builtin = StableDiffusion_1.from_pretrained("builtin")
    builtin.save_pretrained(tmp_path / "model")
    loaded = StableDiffusion_1.from_pretrained(tmp_path / "model")
    assert replace(loaded.spec, vocabulary=EMBEDDED_VOCABULARY) == builtin.spec
    pictures = [each.generate("a red circle", seed=1, num_inference_steps=2)[0] for each in (builtin, loaded)]
    assert pictures[0].tobytes() == pictures[1].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("split", [Split.HELD_OUT, Split.TRAIN])
def test_pictures_obey_captions(split: Split) -> None:
    scores = evaluate(StableDiffusion_1.from_pretrained("builtin"), count=60, split=split)
    assert scores.things > 0.93 and scores.places > 0.93 and scores.background > 0.95, scores
