"""What the files are that commands are given, and models without weights to hold them against."""

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from refiners.foundationals.latent_diffusion import StableDiffusion, StableDiffusion_1, StableDiffusion_XL
from refiners.foundationals.latent_diffusion.files.pretrained import BUILTIN, find_source
from refiners.foundationals.latent_diffusion.lora import inspect_lora
from refiners.weights.formats import Content, Family, identify, identify_file
from refiners.weights.lora_keys import LoraFile, read_lora

# What tells that a folder is a LoRA.
LORA_FILES = (
    *("adapter_config.json", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"),
    *("unet/adapter_config.json", "text_encoder/adapter_config.json", "text_encoder_2/adapter_config.json"),
)


def find_lora(where: str) -> LoraFile | None:
    """The LoRA in a file or folder, None if that holds none. Raises ValueError if it is a file, but none of weights."""
    path = Path(where)
    if path.is_dir():
        return read_lora(path) if any((path / name).is_file() for name in LORA_FILES) else None
    if not path.is_file():
        return None
    lora = read_lora(path)
    identity = identify({key: tuple(tensor.shape) for key, tensor in lora.tensors.items()})
    return lora if identity.content is Content.LORA else None


def check_is_model(where: str) -> None:
    """Raise ValueError if it is a file with something else than a model of a kind that we have."""
    if not Path(where).is_file():
        return
    identity = identify_file(where)
    if identity.content is Content.LORA:
        raise ValueError(f"{where}: this is no model, but a {identity}; name the model here, and the LoRA with --lora")
    if identity.content not in (Content.CHECKPOINT, Content.UNKNOWN):
        raise ValueError(f"{where}: this is no whole model, but {identity}; give the file or folder of a whole model")
    if identity.family not in (Family.SD1, Family.SDXL, None):
        raise ValueError(f"{where}: this is a {identity}, but only {Family.SD1} and {Family.SDXL} can be loaded so far")


def empty_model(where: str | None = None, family: Family | None = None) -> StableDiffusion:
    """The tree of a model on the meta device: that of `where`, or else the one of a family."""
    if where is None:
        return (StableDiffusion_XL if family is Family.SDXL else StableDiffusion_1)(device="meta")
    spec = find_source(where).spec(StableDiffusion.known_specs())
    return StableDiffusion.class_for(spec, where)(device="meta", spec=spec)


def empty_model_for_lora(lora: str | LoraFile) -> StableDiffusion:
    """The tree of the released model of the family that a LoRA is of.

    If it does not tell: of the model that comes with the package if all of it fits there, else of Stable Diffusion 1.
    """
    file = lora if isinstance(lora, LoraFile) else read_lora(lora)
    family = inspect_lora(file).identity.family
    if family is None:
        builtin = empty_model(BUILTIN)
        report = inspect_lora(file, builtin).report
        if report is not None and report.attached and not report.left_out:
            return builtin
    return empty_model(family=family)


def open_picture(path: str) -> Image.Image:
    """A picture, the right way up. Raises ValueError if it is none, is damaged, or is far too large."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}; make it smaller first") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: this is no picture in a known format") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: this picture is damaged, or cannot be read ({error})") from error
