"""Recipe `textual_inversion`: finds vectors for a new word, all weights of the model untouched (arXiv 2208.01618)."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from refiners.foundationals.clip import CLIPTextEncoder, CLIPTokenizer, ConceptExtender
from refiners.foundationals.clip.concepts import Concept
from refiners.foundationals.clip.text_encoder import TokenEncoder
from refiners.training.data.captions import CaptionRule
from refiners.training.distributed import Process
from refiners.training.recipes.config import ResultName, TextToImageConfig
from refiners.training.recipes.text_to_image import Choice, load_model, parameters_of, read_pictures, train
from refiners.training.settings import ConfigError, Section, TextSetting, TupleOf
from refiners.training.trainer import Trainer
from refiners.weights.files import write_safetensors


class TextualInversionConfig(Section):
    """The section `[textual_inversion]`.

    token: the new word, as in "<cat-toy>".
    initial_text: what its vectors are at first; they are those of these words, over again if there are too few.
    vectors: how many the word has.
    templates: captions, with `{}` in the place of the word; one is chosen for each sample.
    name: of the result, `<save_folder>/<name>.safetensors`, which diffusers loads too.
    """

    token: TextSetting = "<concept>"
    initial_text: TextSetting
    vectors: int = Field(default=1, ge=1, le=75)
    templates: TupleOf[tuple[str, ...]] = (
        "{}",
        "a photo of {}",
        "a picture of {}",
        "a close view of {}",
        "{} in the scene",
    )
    name: ResultName = "concept"

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError('there is no template; give one such as "a photo of {}"')
        for template in value:
            if "{}" not in template:
                raise ValueError(f"{template!r} has no {{}} in the place of the word")
        return value


class TextualInversionTrainingConfig(TextToImageConfig):
    """The settings of recipe `textual_inversion`."""

    USES_CAPTIONS = False

    recipe: Literal["textual_inversion"] = "textual_inversion"
    textual_inversion: TextualInversionConfig

    @property
    def trains_text_encoder(self) -> bool:
        """The vectors of the word are a part of it."""
        return True


def run(config: TextualInversionTrainingConfig, process: Process) -> Trainer:
    """Train as the config says. Captions of the data set are not used."""
    settings = config.textual_inversion
    captioned = config.dataset.model_copy(update={"default_caption": settings.token})
    pictures = read_pictures(config.model_copy(update={"dataset": captioned}))
    sd = load_model(config, process)
    extender = ConceptExtender(sd.clip_text_encoder)
    extender.add_concept(settings.token, initial_vectors(sd.clip_text_encoder, settings))
    extender.inject()
    (concept,) = sd.clip_text_encoder.layers(Concept)
    concept.weight.data = concept.weight.data.float()  # whatever the encoder is in: small changes must not get lost

    def save(folder: Path) -> Path:
        path = folder / f"{settings.name}.safetensors"
        write_safetensors(path, {settings.token: concept.weight.detach()})
        return path

    choice = Choice(
        models={"text_encoder": sd.clip_text_encoder},
        parameters=parameters_of({"concept": concept}),
        save=save,
        trains_text=True,
        captions=CaptionRule(templates=settings.templates),
    )
    return train(config, sd, [replace(picture, caption=settings.token) for picture in pictures], choice, process)


def initial_vectors(encoder: CLIPTextEncoder, settings: TextualInversionConfig) -> Tensor:
    """The vectors of the initial text, (vectors, D)."""
    tokenizer = encoder.ensure_find(CLIPTokenizer)
    if settings.vectors > tokenizer.sequence_length - 2:  # one token begins a text, and one ends it
        raise ConfigError(
            f"textual_inversion.vectors = {settings.vectors} do not fit into a text of this model, which takes "
            f"{tokenizer.sequence_length - 2}"
        )
    pieces = tokenizer.pieces(settings.initial_text)
    ids = [token_id for piece in pieces for token_id in piece.token_ids]
    if not ids:
        raise ConfigError(f"textual_inversion.initial_text = {settings.initial_text!r} has no word in it; give one")
    chosen = [ids[index % len(ids)] for index in range(settings.vectors)]
    with torch.no_grad():
        return encoder.ensure_find(TokenEncoder).weight[chosen].float().clone()
