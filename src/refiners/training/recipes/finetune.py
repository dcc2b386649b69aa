"""Recipe `finetune`: trains all weights of the UNet, and those of the text encoder if asked to."""

from pathlib import Path
from typing import Literal

from pydantic import model_validator
from torch import nn

from refiners.training.distributed import Process
from refiners.training.recipes.config import ResultName, TextToImageConfig
from refiners.training.recipes.text_to_image import Choice, load_model, parameters_of, read_pictures, train
from refiners.training.settings import Section
from refiners.training.trainer import Trainer


class FinetuneConfig(Section):
    """The section `[finetune]`.

    text_encoder: whether the text encoder trains as well.
    name: of the result, a folder that `StableDiffusion_1.from_pretrained` and diffusers load.
    """

    text_encoder: bool = False
    name: ResultName = "model"


class FinetuneTrainingConfig(TextToImageConfig):
    """The settings of recipe `finetune`."""

    recipe: Literal["finetune"] = "finetune"
    finetune: FinetuneConfig = FinetuneConfig()

    @property
    def trains_text_encoder(self) -> bool:
        """Whether it is asked to."""
        return self.finetune.text_encoder

    @model_validator(mode="after")
    def _keeps_small_changes(self) -> "FinetuneTrainingConfig":
        if self.models.dtype != "float32":
            raise ValueError(
                f'models.dtype = "{self.models.dtype}" is too coarse for weights that train: small changes get lost; '
                'set it to "float32", and training.precision for the computation'
            )
        return self


def run(config: FinetuneTrainingConfig, process: Process) -> Trainer:
    """Train as the config says."""
    pictures = read_pictures(config)
    sd = load_model(config, process)
    models: dict[str, nn.Module] = {"unet": sd.unet}
    if config.finetune.text_encoder:
        models["text_encoder"] = sd.clip_text_encoder

    def save(folder: Path) -> Path:
        path = folder / config.finetune.name
        sd.save_pretrained(path)
        return path

    choice = Choice(models, parameters_of(models), save, trains_text=config.finetune.text_encoder, saves_often=False)
    return train(config, sd, pictures, choice, process)
