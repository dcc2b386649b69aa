"""Recipe `control_net`: trains a ControlNet, a copy of the UNet's way down that sees a picture (arXiv 2302.05543)."""

from math import log2
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.control import (
    ControlNet,
    ControlNetAdapter,
    ControlNetSpec,
    save_control_net,
)
from refiners.training.distributed import Process
from refiners.training.recipes.config import ResultName
from refiners.training.recipes.leading import PIXELS, Lead, LeadConfig, from_bytes
from refiners.training.recipes.text_to_image import Choice, load_model, parameters_of, read_pictures, train
from refiners.training.settings import Section
from refiners.training.trainer import Trainer


class ControlNetConfig(Section):
    """The section `[control_net]`.

    format: of the result: "diffusers", a folder, or "original", a single file.
    name: of the result, `<save_folder>/<name>` or `<save_folder>/<name>.safetensors`.
    """

    format: Literal["diffusers", "original"] = "diffusers"
    name: ResultName = "control-net"


class ControlNetTrainingConfig(LeadConfig):
    """The settings of recipe `control_net`."""

    recipe: Literal["control_net"] = "control_net"
    control_net: ControlNetConfig = ControlNetConfig()


def inject_control_net(sd: StableDiffusion_1, config: ControlNetConfig) -> Choice:
    """Put a new ControlNet, which changes nothing at first, onto the UNet."""
    halvings = round(log2(sd.lda.spec.downsampling_factor))
    control_net = ControlNet.from_unet(sd.unet, ControlNetSpec.condition_channels[: halvings + 1])
    adapter = ControlNetAdapter(sd, control_net.to(dtype=torch.float32)).inject()

    def lead(pixels: Tensor) -> None:
        adapter.set_controlnet_condition(from_bytes(pixels))

    def save(folder: Path) -> Path:
        path = folder / (config.name if config.format == "diffusers" else f"{config.name}.safetensors")
        save_control_net(control_net, path)
        return path

    trees = {"control_net": control_net}
    return Choice(
        {**trees},
        parameters_of(trees),
        save,
        lead=Lead(PIXELS, lead, adapter.set_controlnet_condition),
        blocks=[control_net.condition_encoder],  # once for all steps of a sample
    )


def run(config: ControlNetTrainingConfig, process: Process) -> Trainer:
    """Train as the config says."""
    pictures = read_pictures(config)
    sd = load_model(config, process)
    return train(config, sd, pictures, inject_control_net(sd, config.control_net), process)
