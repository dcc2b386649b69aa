"""Models from one form of files to another, tensor by tensor: no value is changed unless a dtype is asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from refiners.foundationals.latent_diffusion.files import diffusers_folder, parts_folder, pretrained, single_file
from refiners.foundationals.latent_diffusion.files.single_file import SingleFile
from refiners.foundationals.latent_diffusion.specs import StableDiffusionSpec
from refiners.foundationals.latent_diffusion.stable_diffusion import StableDiffusion
from refiners.weights.matching import is_finite

Write = Callable[[Path, StableDiffusionSpec, Mapping[str, Tensor], torch.dtype | None], None]
FORMS: dict[str, Write] = {
    "diffusers": diffusers_folder.write,
    "single-file": single_file.write,
    "parts": parts_folder.write,
}


@dataclass(frozen=True)
class ModelFiles:
    """A model as it was read. tensors: by our names, part first, memory-mapped and in the dtypes of the files."""

    where: str
    spec: StableDiffusionSpec
    tensors: Mapping[str, Tensor]


def read_model(where: Path | str, part: str | None = None) -> ModelFiles:
    """Read what `StableDiffusion.from_pretrained` takes.

    part: "unet", "lda" or "clip_text_encoder" to read no other part, where they have files of their own.
    Raises ValueError for files that are damaged or of another model, FileNotFoundError if there are none.
    """
    source = pretrained.find_source(where)
    spec = source.spec(StableDiffusion.known_specs())
    model = StableDiffusion.class_for(spec, str(where))(device="meta", spec=spec)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    own = {name: shape for name, shape in shapes.items() if part is None or name.startswith(f"{part}.")}
    tensors = source.read(spec, shapes if isinstance(source, SingleFile) else own)
    return ModelFiles(str(where), spec, {name: tensors[name] for name in own})


def write_model(model: ModelFiles, target: Path | str, form: str, dtype: torch.dtype | None = None) -> None:
    """Write a model in a form of `FORMS`.

    dtype: None for those of the files.
    Raises ValueError for a form that there is not, a name that does not suit it, or values too large for `dtype`.
    """
    if form not in FORMS:
        raise ValueError(f"there is no form of models called {form!r}; choose from {', '.join(FORMS)}")
    target = Path(target)
    if (form == "single-file") != (target.suffix == ".safetensors"):
        wanted = "a file: give it a name that ends in .safetensors" if form == "single-file" else "a folder: name one"
        raise ValueError(f"{target}: the form {form} is {wanted}")
    check_range(model.tensors, dtype)
    FORMS[form](target, model.spec, model.tensors, dtype)


def convert_part(source: Path | str, part: str, target: Path | str, dtype: torch.dtype | None = None) -> int:
    """Write one part of a model for its `load_state_dict`, and return of how many tensors it is. Raises as above."""
    tensors = read_model(source, part).tensors
    check_range(tensors, dtype)
    parts_folder.write_part(Path(target), part, tensors, dtype)
    return len(tensors)


def check_range(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Raise ValueError if a value is finite, but would not be in `dtype`."""
    if dtype is None:
        return
    for name, tensor in tensors.items():
        if not is_finite(tensor.to(dtype)):
            raise ValueError(f"{name} has values too large for {dtype}: keep the dtype of the files")
