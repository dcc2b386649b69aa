"""Recipe `lora`: trains low-rank updates of chosen layers (arXiv 2106.09685)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import nn

import refiners.fluxion.layers as fl
from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.lora import save_lora
from refiners.training.data.captions import CaptionRule
from refiners.training.distributed import Process
from refiners.training.recipes.config import Probability, TextToImageConfig
from refiners.training.recipes.text_to_image import Choice, load_model, parameters_of, read_pictures, train
from refiners.training.settings import Section
from refiners.training.targets import find_targets
from refiners.training.trainer import Trainer

_LAYERS: dict[str, type[nn.Module]] = {"Linear": nn.Linear, "Conv2d": nn.Conv2d}


class LoraConfig(Section):
    """The section `[lora]`.

    rank, alpha: of each update; alpha is the rank if not given.
    trigger_phrase: put before each caption; `use_only_trigger_probability`: how often it stands alone.
    unet_targets, text_encoder_targets: classes or paths in the trees, see `refiners.training.targets`; empty for none.
    layers: the kinds of layers that are adapted there.
    format: of the result: "kohya" (A1111, ComfyUI, …), "diffusers" or "peft"; all load in Refiners.
    name: of the result, `<save_folder>/<name>.safetensors`.
    """

    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    trigger_phrase: str = ""
    use_only_trigger_probability: float = Probability
    unet_targets: tuple[str, ...] = ("Attention", "SelfAttention")
    text_encoder_targets: tuple[str, ...] = ()
    layers: tuple[Literal["Linear", "Conv2d"], ...] = ("Linear",)
    format: Literal["kohya", "diffusers", "peft"] = "kohya"
    name: str = Field(default="lora", pattern=r"^[^/.\\]+$")


class LoraTrainingConfig(TextToImageConfig):
    """The settings of recipe `lora`."""

    recipe: Literal["lora"] = "lora"
    lora: LoraConfig = LoraConfig()


def inject_loras(sd: StableDiffusion_1, config: LoraConfig) -> Choice:
    """Put new LoRAs, which are zero at first, onto the targets."""
    trees: dict[str, tuple[fl.Chain, Sequence[str]]] = {
        "unet": (sd.unet, config.unet_targets),
        "text_encoder": (sd.clip_text_encoder, config.text_encoder_targets),
    }
    kinds = tuple(_LAYERS[kind] for kind in config.layers)
    models: dict[str, nn.Module] = {}
    loras: dict[str, nn.Module] = {}
    with fl.transaction():
        for key, (tree, patterns) in trees.items():
            for layer, parent in find_targets(tree, patterns, kinds):
                adapter = LoraAdapter(
                    layer, rank=config.rank, alpha=config.alpha, name=config.name, dtype=torch.float32
                ).inject(parent)
                loras[adapter.get_path()] = adapter.loras[config.name]
                models[key] = tree

    def save(folder: Path) -> Path:
        path = folder / (config.name if config.format == "peft" else f"{config.name}.safetensors")
        save_lora(path, sd, config.name, config.format)
        return path

    return Choice(
        models=models,
        parameters=parameters_of(loras),
        save=save,
        trains_text="text_encoder" in models,
        captions=CaptionRule(config.trigger_phrase, config.use_only_trigger_probability),
    )


def run(config: LoraTrainingConfig, process: Process) -> Trainer:
    """Train as the config says."""
    pictures = read_pictures(config)
    sd = load_model(config, process)
    choice = inject_loras(sd, config.lora)
    return train(config, sd, pictures, choice, process)
