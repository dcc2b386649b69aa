"""Files of ControlNets, read: diffusers' folders, the original single files, and those with our own names."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from refiners.foundationals.latent_diffusion.control import control_net_configs
from refiners.foundationals.latent_diffusion.control.control_net import ControlNetSpec
from refiners.foundationals.latent_diffusion.control.control_net_names import diffusers_names, single_file_names
from refiners.foundationals.latent_diffusion.files.diffusers_folder import SUFFIXES
from refiners.foundationals.latent_diffusion.files.hub import fetch_from_hub
from refiners.foundationals.latent_diffusion.files.parts_folder import UNCHANGED
from refiners.foundationals.latent_diffusion.files.pretrained import REPOSITORY, SINGLE_FILE_SUFFIXES, fetch_from
from refiners.foundationals.latent_diffusion.unet import UNet
from refiners.foundationals.latent_diffusion.unet_spec import UNetSpec
from refiners.weights.formats import Content, identify
from refiners.weights.rules import Names, UnknownNameError
from refiners.weights.tensors import read_tensors

STEM = "diffusion_pytorch_model"  # what a folder's weights are called
ORIGINAL_PREFIX = "control_model."
# What is in the names of each form alone.
FORMS: dict[str, Callable[[ControlNetSpec], Names]] = {
    "controlnet_cond_embedding.": diffusers_names,
    "input_hint_block.": single_file_names,
    "SetContextDefault.": lambda spec: UNCHANGED,
}
TRANSFORMER_LAYER = re.compile(
    r"(DownBlocks\.Chain_\d+|MiddleBlock)\.SpatialTransformer\.TransformerLayer(?:_(\d+))?\."
)
UNION_TENSOR = "task_embedding"  # of all kinds of pictures that such a ControlNet may see
FIRST_CONVOLUTION = "DownBlocks.Chain_1.Conv2d.weight"
# Convolutions of the encoder of the condition, in all forms; the number tells their order.
ENCODER_WEIGHT = re.compile(
    r"(?:.*\.)?(?:controlnet_cond_embedding\.(?:conv_in|blocks\.(\d+))|input_hint_block\.(\d+)"
    r"|ConditionEncoder\.Conv2d_(\d+))\.weight"
)


@dataclass(frozen=True)
class ControlNetFile:
    """The tensors of a file, without the prefix that all may have, and its configuration if there is one."""

    path: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None

    def names(self, spec: ControlNetSpec) -> Names:
        """Ours to those of the file."""
        return next(form for mark, form in FORMS.items() if any(mark in name for name in self.tensors))(spec)

    def spec(self, unet: UNet) -> ControlNetSpec:
        """The sizes that the configuration tells, or else those of the UNet with what the tensors tell."""
        if self.config is not None:
            spec = control_net_configs.read_spec(self.config, str(self.path.with_name("config.json")))
            own = replace(spec.unet, position_frequencies=unet.spec.position_frequencies)  # it has no name there
            return replace(spec, unet=own)
        own = replace(unet.spec, guidance_waves=0)
        spec = ControlNetSpec(self._with_own_layers(own), condition_channels(self.tensors))
        first = self.tensors.get(str(self.names(spec).to_theirs(FIRST_CONVOLUTION)))
        in_channels = spec.unet.in_channels if first is None or first.ndim != 4 else first.shape[1]
        return replace(spec, unet=replace(spec.unet, in_channels=in_channels))

    def _with_own_layers(self, unet: UNetSpec) -> UNetSpec:
        """The sizes of a UNet with the transformer layers that the tensors have, if ControlNets with so few are known.

        Those of diffusers for XL are: "small" ones, which have none on the way down, and "mid" ones, with one layer
        where the UNet has any. Others lack tensors.
        """
        levels, steps = len(unet.channels), unet.blocks_per_level + 1
        several = replace(unet, transformer_layers=(2,) * levels, middle_layers=2)  # whose names are numbered
        names, counts = self.names(ControlNetSpec(several)), defaultdict[str, int](int)
        for name in self.tensors:
            with suppress(UnknownNameError):
                ours = str(names.to_ours(f"{name.rpartition('.')[0]}.weight"))
                if found := TRANSFORMER_LAYER.match(ours):
                    counts[found[1]] = max(counts[found[1]], int(found[2] or 1))
        layers = [
            max(counts[f"DownBlocks.Chain_{level * steps + block + 2}"] for block in range(unet.blocks_per_level))
            for level in range(levels)
        ]
        small, mid = [0] * levels, [min(count, 1) for count in unet.transformer_layers]
        if layers not in (small, mid) or (layers != small and not counts["MiddleBlock"]):
            return unet
        own = replace(unet, transformer_layers=tuple(layers), middle_layers=None)
        return own.with_middle_layers(counts["MiddleBlock"])


def weights_path(where: Path | str) -> Path:
    """The file with the weights: itself, or that of a folder or a repository of the hub in diffusers' layout.

    Raises FileNotFoundError if there is none.
    """
    path = Path(where)
    if path.is_dir():
        fetch = fetch_from(path)
    elif _is_repository(where):
        fetch = fetch_from_hub(str(where))
    else:
        return path
    for suffix in SUFFIXES:
        found = fetch(f"{STEM}{suffix}")
        if found is not None:
            fetch("config.json")  # so that it lies beside the weights
            return found
    raise FileNotFoundError(
        f"{where}: there are no weights in it, such as {STEM}.safetensors, or the hub is out of reach"
    )


def read_control_net(where: Path | str) -> ControlNetFile:
    """Read a file, a folder or a repository. Raises ValueError if it is damaged, FileNotFoundError."""
    path = weights_path(where)
    config = path.with_name("config.json")
    is_configured = path.name.startswith(STEM) and config.is_file()
    tensors = read_tensors(path)
    tensors = {name.removeprefix(ORIGINAL_PREFIX): tensor for name, tensor in tensors.items()}
    return ControlNetFile(path, tensors, _read_json(config) if is_configured else None)


def check_family(file: ControlNetFile, unet: UNet) -> None:
    """Raise ValueError if it is no ControlNet, one for several kinds of pictures, or for models of another family."""
    identity = identify({name: tuple(tensor.shape) for name, tensor in file.tensors.items()})
    if identity.content is not Content.CONTROLNET:
        raise ValueError(f"{file.path}: this is no ControlNet, but {identity}")
    if UNION_TENSOR in file.tensors:
        raise ValueError(
            f"{file.path}: this is a ControlNet-Union, which is told by a number what kind of picture it sees; such do "
            "not load here: get a ControlNet for the one kind"
        )
    spec = unet.spec
    if identity.family not in (None, spec.family):
        raise ValueError(
            f"{file.path}: this is a {identity}, but the model reads text {spec.text_dim} wide"
            f"{f', as {spec.family}' if spec.family else ''}: get one that was made for it"
        )


def _is_repository(where: Path | str) -> bool:
    path = Path(where)
    is_file = path.is_file() or path.suffix in SINGLE_FILE_SUFFIXES
    return isinstance(where, str) and not is_file and REPOSITORY.fullmatch(where) is not None


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: this is not JSON ({error}); get the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: this should be a JSON object, but it is a {type(content).__name__}")
    return cast("dict[str, Any]", content)


def condition_channels(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The widths in the encoder of the condition, as the tensors of any form tell them."""
    found: dict[int, int] = {}
    for name, tensor in tensors.items():
        matched = ENCODER_WEIGHT.fullmatch(name)
        if matched and tensor.ndim == 4:
            number = next((int(group) for group in matched.groups() if group), -1)
            found[number] = tensor.shape[0]
    widths = [found[number] for number in sorted(found)]
    is_original = any("input_hint_block." in name for name in tensors)  # where the last one is of the same row
    return tuple(widths[: -1 if is_original else None][::2])
