"""Stable Diffusion as one file for each part, with our names: what the scripts `convert-…-weights.py` write."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from refiners.foundationals.latent_diffusion.specs import StableDiffusionSpec
from refiners.weights.files import read_safetensors, write_safetensors
from refiners.weights.header import read_header
from refiners.weights.matching import Shapes, match_all
from refiners.weights.rules import Names

UNET_FILE, AUTOENCODER_FILE = "unet.safetensors", "lda.safetensors"
# The file of the text encoders of a model with these.
TEXT_FILES: dict[tuple[str, ...], str] = {
    ("text_encoder",): "CLIPTextEncoderL.safetensors",
    ("text_encoder", "text_encoder_2"): "DoubleTextEncoder.safetensors",
    ("text_encoder_2",): "CLIPTextEncoderG.safetensors",
}
FIRST_CONVOLUTION = "DownBlocks.Chain_1.Conv2d.weight"
UNCHANGED = Names({"": ""})


def part_files(text_encoders: Iterable[str]) -> dict[str, str]:
    """What the file of each part of a model is called; text_encoders: diffusers' names of those that it has."""
    return {
        "clip_text_encoder": TEXT_FILES[tuple(text_encoders)],
        "lda": AUTOENCODER_FILE,
        "unet": UNET_FILE,
    }


class PartsFolder:
    """A folder to load a model from. Raises FileNotFoundError if a part has no file in it."""

    def __init__(self, folder: Path) -> None:
        found = (encoders for encoders, name in TEXT_FILES.items() if (folder / name).is_file())
        self.text_encoders = next(found, ("text_encoder",))
        self.paths = {part: folder / name for part, name in part_files(self.text_encoders).items()}
        for part, path in self.paths.items():
            if not path.is_file():
                raise FileNotFoundError(f"{path}: there is no such file, so this folder is a model without its {part}")

    def spec(self, known: Sequence[StableDiffusionSpec]) -> StableDiffusionSpec:
        """The sizes of the first of the known models with such text encoders, and the file's input channels."""
        found = next(each for each in known if tuple(each.text_encoders) == self.text_encoders)
        first = read_header(self.paths["unet"]).tensors.get(FIRST_CONVOLUTION)
        if first is None or len(first.shape) != 4:
            return found
        return replace(found, unet=replace(found.unet, in_channels=first.shape[1]))

    def read(self, spec: StableDiffusionSpec, shapes: Shapes) -> dict[str, Tensor]:
        """The tensors of the parts in `shapes`, by our names. Raises ValueError if they are not those of the model."""
        tensors: dict[str, Tensor] = {}
        for part, path in self.paths.items():
            prefix = f"{part}."
            below = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
            if below:
                matched = match_all(read_safetensors(path), UNCHANGED, below, str(path))
                tensors |= {prefix + name: tensor for name, tensor in matched.items()}
        return tensors


def write(folder: Path, spec: StableDiffusionSpec, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Write tensors with our names as a folder of parts."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, name in part_files(spec.text_encoders).items():
        write_part(folder / name, part, tensors, dtype)


def write_part(path: Path, part: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Write those of one part, so that the part's `load_state_dict` takes them."""
    prefix = f"{part}."
    own = {
        name.removeprefix(prefix): tensor.to(dtype or tensor.dtype)
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    write_safetensors(path, own, metadata={"format": "pt"})
