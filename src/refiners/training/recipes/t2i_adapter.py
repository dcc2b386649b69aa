"""Recipe `t2i_adapter`: trains a T2I-Adapter, which adds features of a picture to the UNet's (arXiv 2302.08453)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from refiners.fluxion.utils import image_to_tensor
from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.control import ConditionEncoder, T2IAdapter, T2ISpec
from refiners.foundationals.latent_diffusion.control.t2i_adapter_names import save_condition_encoder
from refiners.training.distributed import Process
from refiners.training.recipes.config import ResultName, TextToImageConfig
from refiners.training.recipes.leading import PIXELS, Lead, from_bytes
from refiners.training.recipes.text_to_image import Choice, load_model, parameters_of, read_pictures, train
from refiners.training.settings import Section
from refiners.training.trainer import Trainer


class T2IAdapterConfig(Section):
    """The section `[t2i_adapter]`.

    name: of the result, `<save_folder>/<name>.safetensors`, with the names of diffusers.
    """

    name: ResultName = "t2i-adapter"


class T2IAdapterTrainingConfig(TextToImageConfig):
    """The settings of recipe `t2i_adapter`."""

    IS_LED = True
    recipe: Literal["t2i_adapter"] = "t2i_adapter"
    t2i_adapter: T2IAdapterConfig = T2IAdapterConfig()


def inject_t2i_adapter(sd: StableDiffusion_1, config: T2IAdapterConfig) -> Choice:
    """Put a new T2I-Adapter onto the UNet."""
    spec = T2ISpec.for_unet(sd.unet.spec, sd.lda.spec.downsampling_factor)
    encoder = ConditionEncoder(spec, device=sd.device, dtype=torch.float32)
    adapter = T2IAdapter(sd.unet, config.name, encoder).inject()

    def lead(pixels: Tensor) -> None:
        adapter.set_condition_features(adapter.compute_condition_features(from_bytes(pixels)))

    def show(pictures: Sequence[Image.Image]) -> None:
        pixels = torch.cat([image_to_tensor(picture) for picture in pictures])
        adapter.set_condition_features(adapter.compute_condition_features(pixels))

    def save(folder: Path) -> Path:
        path = folder / f"{config.name}.safetensors"
        save_condition_encoder(path, encoder)
        return path

    trees = {"t2i_adapter": encoder}
    return Choice({**trees}, parameters_of(trees), save, lead=Lead(PIXELS, lead, show))


def run(config: T2IAdapterTrainingConfig, process: Process) -> Trainer:
    """Train as the config says."""
    pictures = read_pictures(config)
    sd = load_model(config, process)
    return train(config, sd, pictures, inject_t2i_adapter(sd, config.t2i_adapter), process)
