"""Reading a LoRA: a safetensors file, a torch file of tensors, or a folder as peft and diffusers save it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import Tensor

from refiners.weights.files import read_with_metadata
from refiners.weights.header import check_is_file
from refiners.weights.lora_keys.settings import METADATA_KEY, Settings, parse_settings
from refiners.weights.torch_files import is_torch_file, read_torch

_KOHYA_KEY = "ss_network_args"
_MAX_SETTINGS_BYTES = 10_000_000
PEFT_SETTINGS = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_DIFFUSERS_WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
COMPONENT_FOLDERS = ("unet", "text_encoder", "text_encoder_2")  # of one pipeline, a peft adapter each


@dataclass(frozen=True)
class LoraFile:
    """A file or folder as it was read: what it holds, before it is known what of a model that goes to."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    settings: Mapping[str, Settings]


def read_lora(path: Path | str) -> LoraFile:
    """Read a LoRA file (safetensors, or a torch file with nothing but tensors) or adapter folder, memory-mapped.

    The weights of a folder of peft stand for all of it: its settings say how strong they are.
    Raises ValueError if it is damaged or no such file, FileNotFoundError if there is nothing, or no weights in it.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if path.name in PEFT_WEIGHTS and (path.parent / PEFT_SETTINGS).exists():
        return _read_peft(path.parent, (path.name,))
    return _read_file(path)


def _read_file(path: Path) -> LoraFile:
    if is_torch_file(path):
        return LoraFile(path, read_torch(path), {}, {})
    tensors, metadata = read_with_metadata(path)
    text = metadata.get(METADATA_KEY)
    settings = _kohya_settings(metadata) if text is None else parse_settings(f"{path}: {METADATA_KEY}", text)
    return LoraFile(path, tensors, metadata, settings)


def _kohya_settings(metadata: Mapping[str, str]) -> dict[str, Settings]:
    """What kohya's scripts say of a network of LyCORIS that its tensors do not."""
    try:
        arguments: object = json.loads(metadata.get(_KOHYA_KEY, "{}"))
    except (ValueError, RecursionError):  # it is of no use to most files, so it need not be right
        return {}
    value = cast("dict[str, object]", arguments).get("rs_lora", False) if isinstance(arguments, dict) else False
    is_rank_stabilised = str(value).lower() != "false"  # as LyCORIS takes it
    return {"": Settings(None, {}, is_rank_stabilised=True)} if is_rank_stabilised else {}


def _read_folder(folder: Path) -> LoraFile:
    if (folder / PEFT_SETTINGS).exists():
        return _read_peft(folder)
    for name in _DIFFUSERS_WEIGHTS:
        if (folder / name).exists():
            return read_lora(folder / name)
    parts = {name: folder / name for name in COMPONENT_FOLDERS if (folder / name / PEFT_SETTINGS).exists()}
    if not parts:
        raise FileNotFoundError(
            f"{folder}: this folder has neither {PEFT_SETTINGS}, nor {_DIFFUSERS_WEIGHTS[0]}, nor one of the folders "
            f"{', '.join(COMPONENT_FOLDERS)} with an adapter; give the path of the LoRA file itself"
        )
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Settings] = {}
    for name, part in parts.items():
        read = _read_peft(part)
        tensors.update({f"{name}.{key}": tensor for key, tensor in read.tensors.items()})
        if "" in read.settings:
            settings[name] = read.settings[""]
    return LoraFile(folder, tensors, {}, settings)


def _read_peft(folder: Path, names: tuple[str, ...] = PEFT_WEIGHTS) -> LoraFile:
    path = folder / PEFT_SETTINGS
    check_is_file(path)
    if path.stat().st_size > _MAX_SETTINGS_BYTES:
        raise ValueError(f"{path}: settings of {path.stat().st_size} bytes; at most {_MAX_SETTINGS_BYTES} are accepted")
    settings = parse_settings(str(path), path.read_bytes().decode(errors="replace"))
    for name in names:
        if (folder / name).exists():
            read = _read_file(folder / name)
            return LoraFile(folder, read.tensors, read.metadata, settings)
    raise FileNotFoundError(f"{folder}: there is {PEFT_SETTINGS} but no {PEFT_WEIGHTS[0]}; save the adapter again")
