"""What `refiners generate` leads a model by besides prompts: ControlNets and T2I-Adapters, and pictures as prompts."""

from pathlib import Path
from typing import Any, cast

import torch

from refiners.cli.settings import Settings
from refiners.cli.sources import open_picture
from refiners.foundationals.clip.image_encoder_names import load_clip_image_encoder
from refiners.foundationals.latent_diffusion.control import ControlNetAdapter, T2IAdapter
from refiners.foundationals.latent_diffusion.control.control_net_files import weights_path
from refiners.foundationals.latent_diffusion.files.pretrained import BUILTIN
from refiners.foundationals.latent_diffusion.generation import TextToImage
from refiners.foundationals.latent_diffusion.image_prompt import IPAdapter
from refiners.foundationals.latent_diffusion.model import resized
from refiners.weights.formats import Content, identify_file

ENCODER_FILES = ("model.safetensors", "pytorch_model.bin")  # in a folder of transformers


@torch.no_grad()
def lead(model: TextToImage, settings: Settings, size: tuple[int, int]) -> None:
    """Put onto the model what the settings name, for pictures of that height and width.

    Raises ValueError, FileNotFoundError for files that are damaged, of another kind, or for another model.
    """
    for number, (file, picture, scale) in enumerate(settings.scaled_controls(), start=1):
        _add_control(model, file, picture, scale, size, f"control_{number}")
    if settings.ip_adapter:
        _add_image_prompts(model, settings)


def _add_control(model: TextToImage, file: str, picture: str, scale: float, size: tuple[int, int], name: str) -> None:
    identity = identify_file(weights_path(file))
    image = resized(open_picture(picture), size)
    if identity.content is Content.CONTROLNET:
        ControlNetAdapter(model, file, scale=scale).inject().set_controlnet_condition(image)
    elif identity.content is Content.T2I_ADAPTER:
        t2i_adapter = T2IAdapter(model.unet, name, weights=file, scale=scale).inject()
        t2i_adapter.set_condition_features(t2i_adapter.compute_condition_features(image))
    else:
        raise ValueError(
            f"{file}: --control takes a ControlNet, a Control-LoRA or a T2I-Adapter, but this is {identity}"
        )


def _add_image_prompts(model: TextToImage, settings: Settings) -> None:
    file, scale = settings.scaled_ip_adapter()
    encoder = _image_encoder(cast(str, settings.image_encoder), model)
    ip_adapter = IPAdapter(model, encoder, weights=file, scale=scale).inject()
    pictures, weights = zip(*settings.scaled_image_prompts(), strict=True)
    images = [open_picture(picture) for picture in pictures]
    ip_adapter.set_clip_image_embedding(ip_adapter.compute_clip_image_embedding(images, weights))


def default_image_encoder(ip_adapter: str, model: str) -> str:
    """Where the image encoder is if none is named: as in IP-Adapter's own repository, or that of the small model.

    Raises ValueError if it is in neither place.
    """
    beside = Path(ip_adapter).parent / "image_encoder"
    if beside.is_dir():
        return str(beside)
    if model == BUILTIN:
        return BUILTIN
    raise ValueError(
        f"{ip_adapter}: there is no folder 'image_encoder' beside it: name the file or folder with --image-encoder"
    )


def _image_encoder(where: str, model: TextToImage) -> Any:
    if where == BUILTIN:
        from refiners.foundationals.scenes.reader import load_image_encoder

        return load_image_encoder()
    path = Path(where)
    if path.is_dir():
        path = next((path / name for name in ENCODER_FILES if (path / name).is_file()), path / ENCODER_FILES[0])
    return load_clip_image_encoder(path, device=model.device, dtype=model.dtype)
