"""Safetensors files in and out: a file is either read whole or refused with the reason."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]  # its PathLike is bare
from torch import Tensor

from refiners.weights.devices import check_is_available
from refiners.weights.header import DTYPES, Header, TensorInfo, bits_per_value, read_header

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(path: Path | str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read all tensors of a safetensors file; on the CPU they are memory-mapped, privately: writes stay in memory.

    Raises ValueError if the file is not exactly as the format demands, RuntimeError for a device that is not there,
    FileNotFoundError, IsADirectoryError.
    """
    return read_with_metadata(path, device)[0]


def read_with_metadata(
    path: Path | str, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `read_safetensors`, and the metadata of the file, {} if it has none."""
    header = read_header(path)
    check_is_available(device)
    if torch.device(device).type == "cpu":
        return _mapped(path, header), header.metadata
    try:
        return load_file(path, device=str(device)), header.metadata
    except SafetensorError as error:
        raise ValueError(
            f"{path}: safetensors cannot read this onto device {str(device)!r} ({error}); check the device and the file"
        ) from error


def _mapped(path: Path | str, header: Header) -> dict[str, Tensor]:
    """The tensors as they lie in the file, each with a storage of its own.

    Not by safetensors' own reader, whose release 0.8.0 never frees two numbers of each tensor.
    """
    size = header.end + sum(info.nbytes for info in header.tensors.values())
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()  # holds no file open
    tensors: dict[str, Tensor] = {}
    for name, info in header.tensors.items():
        dtype, shape = DTYPES[info.dtype], _torch_shape(path, name, info)
        if info.nbytes:  # of nothing there is no view
            values = torch.frombuffer(content, dtype=torch.uint8, count=info.nbytes, offset=header.end + info.begin)
            tensors[name] = values.view(dtype).view(shape)
        else:
            tensors[name] = torch.empty(shape, dtype=dtype)
    return tensors


def _torch_shape(path: Path | str, name: str, info: TensorInfo) -> tuple[int, ...]:
    """The format counts 4-bit values one by one, torch counts them in pairs."""
    per_item = 8 * DTYPES[info.dtype].itemsize // bits_per_value(info.dtype)
    if per_item == 1:
        return info.shape
    if info.shape[-1] % per_item:
        raise ValueError(
            f"{path}: tensor {name!r} of shape {info.shape} packs {per_item} values in a byte across rows, which torch "
            "cannot hold: save it with rows of a whole number of bytes"
        )
    return (*info.shape[:-1], info.shape[-1] // per_item)


def read_metadata(path: Path | str) -> dict[str, str]:
    """Read the metadata of a safetensors file, {} if it has none. Raises as `read_header` does."""
    return read_header(path).metadata


def write_safetensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all: on failure the file that was there before is still there.

    Views are written as the values they show, and tensors that share memory each with their own copy. The same tensors
    and metadata always give the same bytes, whatever the order of the mappings.
    Raises TypeError for names or metadata that are no strings and values that are no tensors, ValueError for a tensor
    that the format cannot hold, FileNotFoundError if the folder does not exist.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    _check_can_write(path, target)
    _check_strings(path, cast("Mapping[object, object]", metadata or {}))
    names = [name for _, _, name in sorted(_sort_key(path, name, tensor) for name, tensor in tensors.items())]
    header = _encode_header(path, {name: tensors[name] for name in names}, metadata)
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in names:
                file.write(_bytes_of(tensors[name]))
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            os.chmod(temporary, target.stat().st_mode)
        os.replace(temporary, target)
    except OSError as error:
        error.filename = str(path)  # which that of a full disk does not tell, and others the temporary name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _check_can_write(path: Path | str, target: Path) -> None:
    if target.is_dir():
        raise IsADirectoryError(f"{path}: this is a directory; give the path of the file to write")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {str(target.parent)!r} does not exist; create it first")


def _check_strings(path: Path | str, metadata: Mapping[object, object]) -> None:
    for key, value in metadata.items():
        for text in (key, value):
            if not isinstance(text, str):
                raise TypeError(
                    f"{path}: metadata {key!r}: {value!r} has a {type(text).__name__}, but both sides must be strings; "
                    "use str() or json.dumps()"
                )
            _check_unicode(path, text)


def _check_unicode(path: Path | str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}: {text!r} cannot be written as UTF-8 ({error}); use another name or text") from error


def _sort_key(path: Path | str, name: object, tensor: object) -> tuple[int, str, str]:
    """Wide types first, so that every tensor is aligned. Refuses what cannot be written."""
    if not isinstance(name, str):
        raise TypeError(f"{path}: the name {name!r} is a {type(name).__name__}, but names must be strings")
    _check_unicode(path, name)
    if name == "__metadata__":
        raise ValueError(f"{path}: no tensor can be called '__metadata__' in a safetensors file; rename it")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{path}: {name!r} is a {type(tensor).__name__}, but a safetensors file holds only tensors")
    if tensor.device.type == "meta":
        raise ValueError(
            f"{path}: tensor {name!r} is on the meta device and has no values; load or initialise it first"
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{path}: tensor {name!r} has layout {tensor.layout}; write its .to_dense() instead")
    if tensor.dtype not in _NAMES:
        raise ValueError(
            f"{path}: tensor {name!r} is {tensor.dtype}, but safetensors holds {', '.join(DTYPES)}; cast it"
        )
    return -tensor.dtype.itemsize, _NAMES[tensor.dtype], name


def _encode_header(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, object] = {}
    if metadata is not None:
        header["__metadata__"] = dict(sorted(metadata.items()))
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": _format_shape(path, name, tensor),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(-(-len(text) // 8) * 8)  # blanks up to a multiple of 8, so that the data is aligned


def _format_shape(path: Path | str, name: str, tensor: Tensor) -> list[int]:
    """The format counts 4-bit values one by one, torch counts them in pairs."""
    per_item = 8 * tensor.dtype.itemsize // bits_per_value(_NAMES[tensor.dtype])
    if per_item == 1:
        return list(tensor.shape)
    if tensor.ndim == 0:
        raise ValueError(f"{path}: tensor {name!r} packs {per_item} values in no dimension; write its .reshape(1)")
    return [*tensor.shape[:-1], tensor.shape[-1] * per_item]


def _bytes_of(tensor: Tensor) -> memoryview:
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    flat = values.as_strided((values.numel(),), (1,))  # one value can have any stride and still count as contiguous
    return flat.view(torch.uint8).numpy().data
