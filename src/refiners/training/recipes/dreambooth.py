"""Recipe `dreambooth`: teaches a LoRA one subject, and reminds it of the subject's class (arXiv 2208.12242).

Pictures of the class, made by the model itself before it trains, are trained on as well, so that the class does not
drift towards the subject (prior preservation, section 3.3).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.training.data.cache import fingerprint, key_of
from refiners.training.data.pictures import SUFFIXES, Picture
from refiners.training.distributed import Process
from refiners.training.randomness import apart, mix
from refiners.training.recipes.config import TextToImageConfig
from refiners.training.recipes.lora import LoraConfig, inject_loras
from refiners.training.recipes.text_to_image import load_model, read_pictures, train
from refiners.training.reporting import note
from refiners.training.settings import FolderSetting, Section, TextSetting
from refiners.training.trainer import Trainer

_MADE = re.compile(r"\d{5}-[0-9a-f]{8}\.png")


class DreamboothConfig(Section):
    """The section `[dreambooth]`.

    instance_prompt: says the subject by a rare word, as in "a photo of sks dog"; the caption of all its pictures.
    class_prompt: the same without that word, "a photo of a dog".
    prior_images: how many pictures of the class to train on; 0 for none.
    prior_folder: where they are; None for `<save_folder>/prior`. Pictures of your own that are there come first, and
        what lacks is made. What was made of another prompt, seed or model is left alone.
    prior_loss_weight: how much the class counts against the subject.
    """

    instance_prompt: TextSetting
    class_prompt: str = ""
    prior_images: int = Field(default=0, ge=0)
    prior_folder: FolderSetting | None = None
    prior_loss_weight: float = Field(default=1.0, ge=0)
    num_inference_steps: int = Field(default=30, ge=1, le=1000)

    @model_validator(mode="after")
    def _has_a_class(self) -> "DreamboothConfig":
        if self.prior_images and not self.class_prompt:
            raise ValueError(f"prior_images = {self.prior_images} need a class_prompt; give one, or set them to 0")
        if self.prior_folder is not None and not self.prior_images:
            raise ValueError("prior_folder is for pictures of the class, but prior_images is 0; say how many")
        return self


class DreamboothTrainingConfig(TextToImageConfig):
    """The settings of recipe `dreambooth`."""

    USES_CAPTIONS = False

    recipe: Literal["dreambooth"] = "dreambooth"
    dreambooth: DreamboothConfig
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _holds_nothing_out(self) -> "DreamboothTrainingConfig":
        if self.dataset.held_out:
            raise ValueError("dataset.held_out: the few pictures of a subject are all trained on; set it to 0")
        return self

    @model_validator(mode="after")
    def _names_the_subject_alone(self) -> "DreamboothTrainingConfig":
        if self.lora.trigger_phrase:
            raise ValueError(
                f"lora.trigger_phrase = {self.lora.trigger_phrase!r} would stand before the class as well; put it into "
                "dreambooth.instance_prompt"
            )
        return self

    @property
    def trains_text_encoder(self) -> bool:
        """Whether it has targets."""
        return bool(self.lora.text_encoder_targets)


def run(config: DreamboothTrainingConfig, process: Process) -> Trainer:
    """Train as the config says."""
    settings = config.dreambooth
    with_default = config.dataset.model_copy(update={"default_caption": settings.instance_prompt})
    subject = read_pictures(config.model_copy(update={"dataset": with_default}))
    subject = [replace(picture, caption=settings.instance_prompt) for picture in subject]
    sd = load_model(config, process)
    prior = _prior_pictures(config, sd, process) if settings.prior_images else []
    choice = inject_loras(sd, config.lora)
    return train(config, sd, balanced(subject, prior), choice, process)


def balanced(subject: Sequence[Picture], prior: Sequence[Picture]) -> list[Picture]:
    """Both together, with the subject's pictures repeated until there are at least as many of them."""
    repeats = max(1, -(-len(prior) // len(subject)))
    return [*list(subject) * repeats, *prior]


def _prior_pictures(config: DreamboothTrainingConfig, sd: StableDiffusion_1, process: Process) -> list[Picture]:
    settings = config.dreambooth
    folder = settings.prior_folder or config.checkpointing.save_folder / "prior"
    folder.mkdir(parents=True, exist_ok=True)
    there = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
    paths = [path for path in there if not _MADE.fullmatch(path.name)][: settings.prior_images]
    count = settings.prior_images - len(paths)
    parts = (settings.class_prompt, settings.num_inference_steps, config.training.seed)
    mark = key_of(*parts, fingerprint(sd.unet), fingerprint(sd.clip_text_encoder))[:8]
    made = [folder / f"{number:05d}-{mark}.png" for number in range(count)]
    show = note("pictures of the class", process)
    for number in range(process.rank, count, process.count):
        if not made[number].exists():
            _make(sd, config, made[number], seed=mix(config.training.seed, "prior", number))
        show(number + 1, count)
    process.wait()
    return [
        Picture(str(path), path.read_bytes, settings.class_prompt, weight=settings.prior_loss_weight)
        for path in (*paths, *made)
    ]


def _make(sd: StableDiffusion_1, config: DreamboothTrainingConfig, path: Path, seed: int) -> None:
    settings = config.dreambooth
    with apart(seed):
        (image,) = sd.generate(
            settings.class_prompt, seed=seed, num_inference_steps=settings.num_inference_steps, show_progress=False
        )
    beside = path.with_suffix(".unfinished")
    image.save(beside, format="PNG")
    beside.replace(path)
