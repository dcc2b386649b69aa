"""What the files are that commands are given, and models without weights to hold them against."""

from pathlib import Path

from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.pretrained import find_source
from refiners.weights.formats import Content, Family, identify_file

# What tells that a folder is a LoRA.
LORA_FILES = (
    *("adapter_config.json", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"),
    *("unet/adapter_config.json", "text_encoder/adapter_config.json"),
)


def is_lora(where: str) -> bool:
    """Whether a file or folder holds a LoRA. Raises ValueError if it is a file, but none of weights."""
    path = Path(where)
    if path.is_dir():
        return any((path / name).is_file() for name in LORA_FILES)
    return path.is_file() and identify_file(path).content is Content.LORA


def check_is_model(where: str) -> None:
    """Raise ValueError if it is a file with something else than a model of a kind that we have."""
    if not Path(where).is_file():
        return
    identity = identify_file(where)
    if identity.content is Content.LORA:
        raise ValueError(f"{where}: this is no model, but a {identity}; name the model here, and the LoRA with --lora")
    if identity.content not in (Content.CHECKPOINT, Content.UNKNOWN):
        raise ValueError(f"{where}: this is no whole model, but {identity}; give the file or folder of a whole model")
    if identity.family not in (Family.SD1, None):
        raise ValueError(f"{where}: this is a {identity}, but only {Family.SD1} can be loaded so far")


def empty_model(where: str | None = None) -> StableDiffusion_1:
    """The tree of a model on the meta device: that of `where`, or by default Stable Diffusion 1's."""
    default = StableDiffusion_1.default_spec
    return StableDiffusion_1(device="meta", spec=find_source(where).spec(default) if where else default)
