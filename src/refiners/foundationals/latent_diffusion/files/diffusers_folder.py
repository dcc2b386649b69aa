"""Stable Diffusion in a folder in diffusers' layout: a subfolder for each part, with its sizes in a `config.json`.

A folder may lie on the hub as well: files are asked for one by one through a `Fetch`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from refiners.foundationals.clip.names import text_encoder_names
from refiners.foundationals.latent_diffusion import autoencoder_names, unet_names
from refiners.foundationals.latent_diffusion.files import diffusers_configs
from refiners.foundationals.latent_diffusion.files.diffusers_text_configs import TOKENIZERS
from refiners.foundationals.latent_diffusion.specs import StableDiffusionSpec
from refiners.weights.files import read_safetensors, write_safetensors
from refiners.weights.matching import Shapes, match_all
from refiners.weights.rules import Names
from refiners.weights.torch_files import read_torch

# The file of that name, relative to the folder, or None if there is none.
Fetch = Callable[[str], Path | None]


@dataclass(frozen=True)
class Part:
    """One part of a model. stem: what its weights files are called, without what tells the format."""

    ours: str
    theirs: str
    stem: str
    names: Names


def parts(spec: StableDiffusionSpec) -> Iterator[Part]:
    """The parts of a model, in the order in which they are read."""
    yield Part("unet", "unet", "diffusion_pytorch_model", unet_names.diffusers_names(spec.unet))
    yield Part("lda", "vae", "diffusion_pytorch_model", autoencoder_names.diffusers_names(spec.autoencoder))
    for name, text in spec.text_encoders.items():
        path = f"clip_text_encoder.{spec.text_encoder_paths[name]}".removesuffix(".")
        yield Part(path, name, "model", text_encoder_names(text))


# In order of preference: a half-precision file only if there is no full one, a torch file only if there is no other.
SUFFIXES = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")


class DiffusersFolder:
    """A folder to load a model from.

    where: what errors call it.  fetch: gives its files.
    Raises FileNotFoundError if it has no `config.json` of the UNet, the autoencoder or any text encoder.
    """

    def __init__(self, where: str, fetch: Fetch) -> None:
        self.where = where
        self.fetch = fetch
        self.configs = {part: self._json(f"{part}/config.json") for part in ("unet", "vae")}
        self.configs |= {part: config for part in TOKENIZERS if (config := self._optional_json(f"{part}/config.json"))}
        if not self.configs.keys() & TOKENIZERS.keys():
            self._required("text_encoder/config.json")

    def spec(self, known: Sequence[StableDiffusionSpec]) -> StableDiffusionSpec:
        """The sizes, as the configuration files tell them. Raises ValueError if the model is none of ours."""
        return diffusers_configs.read_spec(
            where=self.where,
            configs=self.configs,
            scheduler=self._optional_json("scheduler/scheduler_config.json"),
            tokenizers={
                name: self._optional_json(f"{tokenizer}/tokenizer_config.json")
                | self._optional_json(f"{tokenizer}/special_tokens_map.json")
                for name, tokenizer in TOKENIZERS.items()
                if name in self.configs
            },
            merges=self.fetch("tokenizer/merges.txt") or self.fetch("tokenizer_2/merges.txt"),
        )

    def read(self, spec: StableDiffusionSpec, shapes: Shapes) -> dict[str, Tensor]:
        """The tensors of the parts in `shapes`, by our names.

        Raises ValueError, FileNotFoundError if they are not those of the model.
        """
        tensors: dict[str, Tensor] = {}
        for part in parts(spec):
            prefix = f"{part.ours}."
            below = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
            if not below:
                continue
            where, found = self._weights(part)
            matched = match_all(found, part.names, below, where)
            tensors |= {prefix + name: tensor for name, tensor in matched.items()}
        return tensors

    def _weights(self, part: Part) -> tuple[str, dict[str, Tensor]]:
        stem = f"{part.theirs}/{part.stem}"
        torch_stem = stem if part.stem != "model" else f"{part.theirs}/pytorch_model"
        for suffix in SUFFIXES:
            name = (stem if suffix.endswith(".safetensors") else torch_stem) + suffix
            index = self._optional_json(_index_name(name))
            if index:
                shards = sorted(set(cast("dict[str, str]", index["weight_map"]).values()))
                paths = [self._required(f"{part.theirs}/{shard}") for shard in shards]
                return name, {key: tensor for path in paths for key, tensor in _read(path).items()}
            path = self.fetch(name)
            if path:
                return str(path), _read(path)
        raise FileNotFoundError(f"{self.where}: there are no weights, such as {stem}.safetensors; is it all there?")

    def _required(self, name: str) -> Path:
        path = self.fetch(name)
        if path is None:
            raise FileNotFoundError(
                f"{self.where}: there is no {name}, so this is no model in diffusers' layout, or not all of it"
            )
        return path

    def _json(self, name: str) -> dict[str, Any]:
        path = self._required(name)
        try:
            content: object = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: this is not JSON ({error}); get the file again") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}: this should be a JSON object, but it is a {type(content).__name__}")
        return cast("dict[str, Any]", content)

    def _optional_json(self, name: str) -> dict[str, Any]:
        return self._json(name) if self.fetch(name) else {}


def write(folder: Path, spec: StableDiffusionSpec, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Write tensors with our names as a folder that diffusers can load too."""
    configs = diffusers_configs.write_spec(spec)
    for part in parts(spec):
        (folder / part.theirs).mkdir(parents=True, exist_ok=True)
        prefix, to_theirs = f"{part.ours}.", part.names.to_theirs
        renamed = {
            str(to_theirs(name.removeprefix(prefix))): tensor.to(dtype or tensor.dtype)
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        write_safetensors(folder / part.theirs / f"{part.stem}.safetensors", renamed, metadata={"format": "pt"})
    for name, text in configs.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _index_name(name: str) -> str:
    """Of a file in shards; what tells the format comes behind: `model.safetensors.index.fp16.json`."""
    plain = name.replace(".fp16.", ".")
    return f"{plain}.index.json" if plain == name else f"{plain}.index.fp16.json"


def _read(path: Path) -> dict[str, Tensor]:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
