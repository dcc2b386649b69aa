"""Reading torch files that hold nothing but tensors: as zip archives, or in torch's older format.

No code of a file is ever run. What a file would do is checked before it is handed to torch, which then reads it with a
reader for weights only.
"""

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from refiners.weights.devices import check_is_available
from refiners.weights.header import check_is_file, check_name
from refiners.weights.pickles import MAX_PICKLE_BYTES, check_pickles, unreadable

ZIP_START = b"PK\x03\x04"
_OLDER_PICKLES = 5  # of torch's older format: what it is, its version, about the machine, the content, storage names
_NESTED = ("state_dict", "string_to_param")  # of checkpoints, and of A1111's textual inversions
_PARTS = {"image_proj", "ip_adapter"}  # of IP-Adapters, each a dict


class _Parameters(dict[str, Tensor]):
    """What a pickled `torch.nn.ParameterDict` is read as: the tensors alone, and no module."""

    def __setstate__(self, state: object) -> None:
        held = cast("dict[str, object]", state).get("_parameters") if isinstance(state, dict) else None
        if not isinstance(held, dict):
            raise ValueError("a ParameterDict without its parameters")
        self.update(cast("dict[str, Tensor]", held))


def is_torch_file(path: Path | str) -> bool:
    """Whether a file starts as torch files do. Raises FileNotFoundError, IsADirectoryError."""
    check_is_file(path)
    with open(path, "rb") as file:
        start = file.read(9)
    # a safetensors header starts at the ninth byte, whatever its length in the first eight looks like
    return start[8:] != b"{" and start.startswith((ZIP_START, b"\x80"))


def read_torch(path: Path | str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a torch file that holds a dict of tensors; memory-mapped where possible.

    The dict is all of the file, or what it calls "state_dict", or "string_to_param" as in textual inversions. The two
    dicts in files of IP-Adapters become one, as `image_proj.…` and `ip_adapter.…`.
    Raises ValueError if the file holds anything else, is damaged, or wants to run code; RuntimeError for a device that
    is not there; FileNotFoundError, IsADirectoryError.
    """
    check_is_file(path)
    check_is_available(device)
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        raise ValueError(f"{path}: this looks like a safetensors file; read it with read_safetensors")
    is_archive = start.startswith(ZIP_START)
    if is_archive:
        _check_archive(path)
    else:
        with open(path, "rb") as file:
            check_pickles(path, file.read(MAX_PICKLE_BYTES), _OLDER_PICKLES)
    try:
        # torch cannot map the older format
        with torch.serialization.safe_globals([(_Parameters, "torch.nn.modules.container.ParameterDict")]):
            content: object = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise _explain(path, error) from error
    tensors = _tensors_in(path, content)
    _check_size(path, tensors)
    return {name: tensor.detach().to(device) for name, tensor in tensors.items()}


def _check_archive(path: Path | str) -> None:
    """Raises ValueError if an archive is packed, so that little of it could become much, or its pickle is hostile."""
    try:
        pickles = _pickles(path)
    except Exception as error:  # a damaged archive can fail in any way
        raise unreadable(path, str(error)) from error
    for pickle in pickles:
        check_pickles(path, pickle, 1)


def _pickles(path: Path | str) -> list[bytes]:
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
                raise zipfile.BadZipFile(f"{record.filename!r:.80} is compressed, which torch never does")
        pickles = [record for record in records if record.filename.lower().endswith("data.pkl")]
        size = sum(record.file_size for record in pickles)
        if size > MAX_PICKLE_BYTES:
            raise zipfile.BadZipFile(f"a pickle of {size} bytes, over {MAX_PICKLE_BYTES}")
        return [archive.read(record) for record in pickles]


def _check_size(path: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for tensors that a few stored numbers are repeated in."""
    stored, shown = Path(path).stat().st_size, sum(tensor.nbytes for tensor in tensors.values())
    if shown > 2 * stored:  # some models have the same weights twice
        raise ValueError(
            f"{path}: its tensors come to {shown} bytes, but the file has {stored}: numbers are repeated in them; "
            "ask its author for safetensors"
        )


def _explain(path: Path | str, error: Exception) -> ValueError:
    text = str(error)
    if "TorchScript" in text:
        return ValueError(
            f"{path}: refused, since this file wants to run code (a TorchScript program) and a file of weights needs "
            "none; ask its author for safetensors, or convert it where you can trust it"
        )
    return unreadable(path, (text.splitlines() or [type(error).__name__])[0])


def _tensors_in(path: Path | str, content: object) -> dict[str, Tensor]:
    tensors, place = content, "the file"
    if isinstance(content, dict):
        for name in _NESTED:
            nested = cast("dict[object, object]", content).get(name)
            if isinstance(nested, dict):
                tensors, place = cast("object", nested), f"its {name}"
                break
        else:
            tensors = _joined(cast("dict[object, object]", content))
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: {place} should hold a dict of tensors, but it is a {type(tensors).__name__}")
    found = cast("dict[object, object]", tensors)
    strange = [name for name, value in found.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if strange:
        raise ValueError(
            f"{path}: {place} should hold only named tensors, but {len(strange)} of {len(found)} entries are not "
            f"(first: {_list_kinds(found, strange[:3])}); save the dict of tensors alone"
        )
    named = cast("dict[str, Tensor]", found)
    for name in named:
        check_name(path, name)
    return named


def _joined(content: dict[object, object]) -> dict[object, object]:
    """One dict of the parts of an IP-Adapter; what is none stays as it is."""
    if content.keys() != _PARTS or not all(isinstance(part, dict) for part in content.values()):
        return content
    parts = cast("dict[object, dict[object, object]]", content)
    return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}


def _list_kinds(found: Mapping[object, object], names: Iterable[object]) -> str:
    return ", ".join(f"{name!r:.80} is a {type(found[name]).__name__}" for name in names)
