"""Recipe `lora`: trains updates of chosen layers, low-rank ones (arXiv 2106.09685) or of another kind."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

import refiners.fluxion.layers as fl
from refiners.adapters.delta import Delta
from refiners.adapters.delta_adapter import DeltaAdapter
from refiners.adapters.dora import Dora
from refiners.adapters.elementwise_glora import ElementwiseGlora
from refiners.adapters.glora import Glora
from refiners.adapters.ia3 import Ia3
from refiners.adapters.loha import Loha
from refiners.adapters.lokr import Lokr
from refiners.adapters.lora import LoraAdapter
from refiners.adapters.orthogonal import Boft, Oft
from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.lora import save_lora
from refiners.training.data.captions import CaptionRule
from refiners.training.distributed import Process
from refiners.training.recipes.config import Probability, ResultName, TextToImageConfig
from refiners.training.recipes.text_to_image import Choice, load_model, parameters_of, read_pictures, train
from refiners.training.settings import Section, TextSetting, TupleOf
from refiners.training.targets import find_targets
from refiners.training.trainer import Trainer

_LAYERS: dict[str, type[nn.Module]] = {"Linear": nn.Linear, "Conv2d": nn.Conv2d}
_KINDS: dict[str, Callable[..., Delta]] = {
    "dora": Dora.for_layer,
    "loha": Loha.for_layer,
    "lokr": Lokr.for_layer,
    "glora": Glora.for_layer,
    "elementwise_glora": ElementwiseGlora.for_layer,
    "oft": Oft.for_layer,
    "boft": Boft.for_layer,
    "ia3": Ia3.for_layer,
}


class LoraConfig(Section):
    """The section `[lora]`.

    kind: of the updates; others than "lora" and "dora" are in kohya's format only, with the names of LyCORIS.
    rank, alpha: of each update; alpha is the rank if not given. For "oft" and "boft" the rank is the most entries that
        a block may have, and alpha a limit of the turns, none if not given; "ia3" has neither. "elementwise_glora",
        which is peft's GLoRA and has the names of peft, has no alpha and is of linear layers alone.
    trigger_phrase: put before each caption; `use_only_trigger_probability`: how often it stands alone.
    unet_targets, text_encoder_targets: classes or paths in the trees, see `refiners.training.targets`; empty for none.
    layers: the kinds of layers that are adapted there.
    format: of the result: "kohya" (A1111, ComfyUI, …), "diffusers" or "peft"; all load in Refiners.
    name: of the result, `<save_folder>/<name>.safetensors`.
    """

    kind: Literal["lora", "dora", "loha", "lokr", "glora", "elementwise_glora", "oft", "boft", "ia3"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    trigger_phrase: str = ""
    use_only_trigger_probability: Probability = 0.0
    unet_targets: TupleOf[tuple[TextSetting, ...]] = ("Attention", "SelfAttention")
    text_encoder_targets: TupleOf[tuple[TextSetting, ...]] = ()
    layers: TupleOf[tuple[Literal["Linear", "Conv2d"], ...]] = ("Linear",)
    format: Literal["kohya", "diffusers", "peft"] = "kohya"
    name: ResultName = "lora"

    @model_validator(mode="after")
    def _kind_fits(self) -> "LoraConfig":
        if self.format != "kohya" and self.kind not in ("lora", "dora"):
            raise ValueError(f'kind = "{self.kind}" is not written in the form of {self.format}; use "kohya"')
        if self.kind == "ia3" and self.model_fields_set & {"rank", "alpha"}:
            raise ValueError('kind = "ia3" has neither a rank nor an alpha; leave them out')
        if self.kind == "elementwise_glora" and (self.alpha is not None or self.layers != ("Linear",)):
            raise ValueError('kind = "elementwise_glora" has no alpha, and is of layers = ["Linear"] alone')
        return self

    @model_validator(mode="after")
    def _has_something_to_do(self) -> "LoraConfig":
        if not self.layers or not (self.unet_targets or self.text_encoder_targets):
            raise ValueError("there is nothing to adapt: give targets in the UNet or the text encoder, and layers")
        if self.use_only_trigger_probability and not self.trigger_phrase:
            raise ValueError(
                f"use_only_trigger_probability = {self.use_only_trigger_probability}, but there is no trigger_phrase "
                "to stand alone; give one, or leave the probability out"
            )
        return self

    def adapter_for(self, layer: Any) -> DeltaAdapter:
        """A new update on a layer, which changes nothing yet."""
        settings: dict[str, Any] = {"name": self.name, "dtype": torch.float32}
        if self.kind != "ia3":
            settings["rank"] = self.rank
        if self.kind not in ("ia3", "elementwise_glora"):
            settings["alpha"] = self.alpha
        if self.kind == "lora":
            return LoraAdapter(layer, **settings)
        return DeltaAdapter(layer, _KINDS[self.kind](layer, **settings))


class LoraTrainingConfig(TextToImageConfig):
    """The settings of recipe `lora`."""

    recipe: Literal["lora"] = "lora"
    lora: LoraConfig = LoraConfig()

    @property
    def trains_text_encoder(self) -> bool:
        """Whether it has targets."""
        return bool(self.lora.text_encoder_targets)


def inject_loras(sd: StableDiffusion_1, config: LoraConfig) -> Choice:
    """Put new updates, which change nothing at first, onto the targets."""
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
                adapter = config.adapter_for(layer).inject(parent)
                loras[adapter.get_path()] = adapter.deltas[config.name]
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
