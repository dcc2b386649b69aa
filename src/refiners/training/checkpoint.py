"""Checkpoints: one folder each, `step-00000100`, that is there whole or not at all.

A checkpoint holds named parts: nested dicts, lists and tuples of tensors, numbers and strings. Tensors of a part lie in
`<part>.safetensors`; all the rest lies in `state.json`, with a reference where a tensor belongs. It is written beside
its place, brought safely to the disk, and then moved there by one rename. Nothing is pickled.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from refiners.weights.files import read_safetensors, write_safetensors

_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED, _UNWANTED = ".saving-", ".deleting-"


def save_checkpoint(folder: Path, step: int, parts: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint below `folder`, and return where it is.

    Then those of later steps are deleted, which are of a training that was begun anew, and all but the last `keep`.
    Raises OSError if it cannot be written whole, for example on a full disk; those that were there stay valid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _clean(folder)
    target = folder / f"step-{step:08d}"
    beside = folder / f"{_UNFINISHED}{secrets.token_hex(8)}"
    try:
        beside.mkdir()
        _write(beside, step, parts)
        if target.exists():
            target.rename(folder / f"{_UNWANTED}{secrets.token_hex(8)}")
        beside.rename(target)
        _sync_folder(folder)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        last = newest_checkpoint(folder)
        kept = f"the last one that is whole is {last}" if last else "there is none before it"
        raise OSError(
            error.errno, f"the checkpoint of step {step} could not be saved ({error.strerror}); {kept}"
        ) from (error)
    found = checkpoints(folder)
    place = found.index(target)
    for unwanted in (*found[: max(place + 1 - keep, 0)], *found[place + 1 :]):
        unwanted.rename(folder / f"{_UNWANTED}{secrets.token_hex(8)}")
    _clean(folder)
    return target


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read the parts of a checkpoint. Raises ValueError if it is damaged."""
    try:
        state = cast("dict[str, Any]", json.loads((path / "state.json").read_text(encoding="utf-8")))
        parts = cast("dict[str, Any]", state["parts"])
        return {name: unpack(part, _tensors_of(path, name)) for name, part in parts.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: this checkpoint is damaged ({error}); delete it to go on from an older one") from (
            error
        )


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below a folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / "state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that was written last, or None."""
    return next(reversed(checkpoints(folder)), None)


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold of a nested value; the tensors in it go into `tensors`, under names that start with `name`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = [[key, pack(item, f"{name}.{key}", tensors)] for key, item in cast("dict[Any, Any]", value).items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        items = cast("list[Any]", value)
        return {kind: [pack(item, f"{name}.{index}", tensors) for index, item in enumerate(items)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `pack`."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = cast("dict[str, Any]", packed).items()
    if kind == "tensor":
        return tensors[content].clone()
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in content}
    items = [unpack(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def _write(folder: Path, step: int, parts: Mapping[str, Any]) -> None:
    packed: dict[str, Any] = {}
    for name, part in parts.items():
        tensors: dict[str, Tensor] = {}
        packed[name] = pack(part, name, tensors)
        if tensors:
            write_safetensors(folder / f"{name}.safetensors", tensors)
    text = json.dumps({"format": 1, "step": step, "torch": torch.__version__, "parts": packed}, indent=1)
    with open(folder / "state.json", "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _tensors_of(path: Path, part: str) -> dict[str, Tensor]:
    file = path / f"{part}.safetensors"
    return read_safetensors(file) if file.exists() else {}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clean(folder: Path) -> None:
    """Delete what a process that was killed has left unfinished, and what is no longer wanted."""
    for path in folder.iterdir():
        if path.name.startswith((_UNFINISHED, _UNWANTED)):
            shutil.rmtree(path, ignore_errors=True)
