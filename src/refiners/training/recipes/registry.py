"""Runs the recipe that a config names: `train("config.toml")`, on one process or under `torchrun`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from refiners.training.distributed import Process, joined
from refiners.training.recipes import (
    control_net,
    dreambooth,
    finetune,
    ip_adapter,
    lora,
    t2i_adapter,
    textual_inversion,
)
from refiners.training.recipes.config import TextToImageConfig
from refiners.training.settings import ConfigError, nearest, read_toml
from refiners.training.trainer import Trainer


class Recipe(NamedTuple):
    """What a recipe is made of."""

    config: type[TextToImageConfig]
    run: Callable[[Any, Process], Trainer]


RECIPES = {
    "lora": Recipe(lora.LoraTrainingConfig, lora.run),
    "finetune": Recipe(finetune.FinetuneTrainingConfig, finetune.run),
    "dreambooth": Recipe(dreambooth.DreamboothTrainingConfig, dreambooth.run),
    "textual_inversion": Recipe(textual_inversion.TextualInversionTrainingConfig, textual_inversion.run),
    "control_net": Recipe(control_net.ControlNetTrainingConfig, control_net.run),
    "ip_adapter": Recipe(ip_adapter.IPAdapterTrainingConfig, ip_adapter.run),
    "t2i_adapter": Recipe(t2i_adapter.T2IAdapterTrainingConfig, t2i_adapter.run),
}


def train(path: Path | str, recipe: str | None = None) -> Trainer:
    """Train as a config file says; the same call again goes on where the last one was stopped.

    recipe: a name in `RECIPES`; None for the one that the file names.
    Raises ConfigError for mistakes in the file, FileNotFoundError if it, or what it names, is not there.
    """
    chosen = RECIPES[recipe or _recipe_of(path)]
    config = chosen.config.load(path)
    with joined(config.training.device) as process:
        config.training.share_of(process.count)
        return chosen.run(config, process)


def _recipe_of(path: Path | str) -> str:
    name = read_toml(path).get("recipe")
    if name is None:
        raise ConfigError(f"{path}: it names no recipe; begin it with `recipe = ` and one of {', '.join(RECIPES)}")
    if not isinstance(name, str) or name not in RECIPES:
        raise ConfigError(f"{path}: there is no recipe {name!r}; {nearest(str(name), RECIPES)}")
    return name
