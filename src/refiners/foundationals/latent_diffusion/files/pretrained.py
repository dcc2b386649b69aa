"""Where models come from and go to: a folder in diffusers' layout, a single file, the hub, or the package itself."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from refiners.foundationals.latent_diffusion.embedded import EMBEDDED, EMBEDDED_WEIGHTS
from refiners.foundationals.latent_diffusion.files import diffusers_folder, single_file
from refiners.foundationals.latent_diffusion.files.diffusers_folder import DiffusersFolder, Fetch
from refiners.foundationals.latent_diffusion.files.hub import fetch_from_hub
from refiners.foundationals.latent_diffusion.files.parts_folder import UNCHANGED, UNET_FILE, PartsFolder
from refiners.foundationals.latent_diffusion.files.single_file import SingleFile
from refiners.foundationals.latent_diffusion.specs import StableDiffusionSpec
from refiners.weights.devices import check_is_available
from refiners.weights.files import read_safetensors
from refiners.weights.matching import Shapes, match_all

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # of the hub: owner/name
BUILTIN = "builtin"  # the model that comes with the package
SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


class Source(Protocol):
    """What a model can be loaded from."""

    def spec(self, known: Sequence[StableDiffusionSpec]) -> StableDiffusionSpec:
        """The sizes; where the files do not tell, those of the first of the known models that is of their kind."""
        ...

    def read(self, spec: StableDiffusionSpec, shapes: Shapes) -> dict[str, Tensor]:
        """All tensors, by our names."""
        ...


class EmbeddedModel:
    """The package as a source to load the model from."""

    def spec(self, known: Sequence[StableDiffusionSpec]) -> StableDiffusionSpec:
        """Its own sizes."""
        return EMBEDDED

    def read(self, spec: StableDiffusionSpec, shapes: Shapes) -> dict[str, Tensor]:
        """All tensors, by our names."""
        return match_all(read_safetensors(EMBEDDED_WEIGHTS), UNCHANGED, shapes, str(EMBEDDED_WEIGHTS))


def find_source(where: Path | str, revision: str | None = None) -> Source:
    """The source of that name. Raises FileNotFoundError if nothing is there."""
    if where == BUILTIN:
        return EmbeddedModel()
    path = Path(where)
    if (path / UNET_FILE).is_file():
        return PartsFolder(path)
    if path.is_dir():
        return DiffusersFolder(str(path), fetch_from(path))
    if path.is_file() or path.suffix in SINGLE_FILE_SUFFIXES:
        return SingleFile(path)
    if isinstance(where, Path) or not REPOSITORY.fullmatch(where):
        raise FileNotFoundError(
            f"{str(where)!r} is no folder, no file, no repository of the hub (such as 'owner/name') and not "
            f"{BUILTIN!r}; check the path"
        )
    return DiffusersFolder(f"{where} on the hub", fetch_from_hub(where, revision))


def fill(
    model: nn.Module, spec: StableDiffusionSpec, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> None:
    """Give a model on the meta device its tensors, which it then holds without a copy where none is needed."""
    check_is_available(device)
    for name in tensors:
        own_dtype = spec.autoencoder.dtype_for(dtype) if name.startswith("lda.") else dtype
        tensors[name] = tensors[name].to(device=device, dtype=own_dtype)
    model.load_state_dict(tensors, assign=True)


def save(
    where: Path | str, spec: StableDiffusionSpec, tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> None:
    """Write tensors with our names as a single file or as a folder, as the name of `where` says."""
    path = Path(where)
    if path.suffix == ".safetensors":
        single_file.write(path, spec, tensors, dtype)
    elif path.suffix in SINGLE_FILE_SUFFIXES or path.is_file():
        raise ValueError(f"{path}: models are written as .safetensors or as a folder; choose another name")
    else:
        diffusers_folder.write(path, spec, tensors, dtype)


def fetch_from(folder: Path) -> Fetch:
    """Gives files of a folder."""
    return lambda name: folder / name if (folder / name).is_file() else None
