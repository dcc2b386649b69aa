"""The header of a safetensors file, checked before anything is allocated.

A file is: 8 bytes (length of the header, little endian), the header (a JSON object: name -> dtype, shape, data_offsets;
`__metadata__` -> strings), the tensors' bytes, side by side. https://github.com/huggingface/safetensors#format
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import torch

MAX_HEADER_BYTES = 25_000_000  # honest ones have 0.1 to 5 MB; to parse this many takes 2 s and 0.8 GB
MAX_NAME = 1000  # characters: no model has longer names, and messages quote them
MAX_SIZE = 2**63 - 1  # torch holds sizes as signed 64-bit numbers

# The dtype names of the format that torch can hold.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F4": torch.float4_e2m1fn_x2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}

# What people often have in place of a safetensors file. Asked only once the length of the header is impossible: a good
# file may begin with the same bytes.
_IMPOSTORS = {
    b"PK\x03\x04": "a zip archive: if it is a torch file, use read_torch",
    b"\x80\x02": "a pickle: if it is a torch file, use read_torch",
    b"version ": "a Git LFS pointer: run `git lfs pull` to fetch the file itself",
    b"<": "a web page: download the file itself",
    b"GGUF": "a GGUF file: convert it to safetensors",
    b"\x89PNG": "a picture: give the path of a weights file",
    b"\xff\xd8\xff": "a picture: give the path of a weights file",
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor. dtype is the format's name, a key of `DTYPES`; F4 counts single values.

    begin: the first of its bytes, counted from the end of the header.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    begin: int


@dataclass(frozen=True)
class Header:
    """The contents of a file, without its tensors' values; tensors are in the header's order.

    end: how many bytes of the file come before the tensors'.
    """

    tensors: dict[str, TensorInfo]
    end: int
    metadata: dict[str, str] = field(default_factory=dict[str, str])


def read_header(path: Path | str) -> Header:
    """Read and check the header of a safetensors file; the tensors' bytes are not touched.

    Raises ValueError if anything in the file is not as the format demands, FileNotFoundError, IsADirectoryError.
    """
    check_is_file(path)
    with open(path, "rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        header_bytes = _header_length(path, file, file_bytes)
        text = file.read(header_bytes)
    entries = _parse(path, text)
    metadata = _metadata(path, entries.pop("__metadata__", None))
    tensors = {name: _tensor(path, name, entry) for name, entry in entries.items()}
    _check_layout(path, tensors, file_bytes - 8 - header_bytes)
    return Header(tensors, 8 + header_bytes, metadata)


def check_is_file(path: Path | str) -> None:
    """Raise FileNotFoundError, IsADirectoryError or ValueError, in plain words, unless `path` is of a file."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: this is a directory; give the path of one weights file in it")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there is no such file; check the path (relative to {os.getcwd()})")
    if not os.path.isfile(path):  # reading from a pipe or a device may never end
        raise ValueError(f"{path}: this is a pipe or a device; give the path of a weights file")


def check_name(path: Path | str, name: str) -> None:
    """Raise ValueError for a tensor whose name is too long to be one."""
    if len(name) > MAX_NAME:
        raise _damaged(path, f"a tensor has a name of {len(name)} characters, over {MAX_NAME}: {_short(name)}")


def bits_per_value(dtype: str) -> int:
    return 4 if dtype == "F4" else 8 * DTYPES[dtype].itemsize


def _damaged(path: Path | str, problem: str) -> ValueError:
    return ValueError(f"{path}: {problem}; the file is damaged or not safetensors: get it again from its source")


def _header_length(path: Path | str, file: BinaryIO, file_bytes: int) -> int:
    start = file.read(8)
    if len(start) < 8:
        raise _damaged(path, f"the file has {file_bytes} bytes, but the length of its header alone takes 8")
    length = int.from_bytes(start, "little")
    if length > min(MAX_HEADER_BYTES, file_bytes - 8):
        for magic, advice in _IMPOSTORS.items():
            if start.startswith(magic):
                raise ValueError(f"{path}: not a safetensors file, it starts with {magic!r} like {advice}")
    if length > MAX_HEADER_BYTES:
        raise _damaged(path, f"it announces a header of {length} bytes, but at most {MAX_HEADER_BYTES} are accepted")
    if 8 + length > file_bytes:
        raise _damaged(path, f"it announces a header of {length} bytes, but only {file_bytes - 8} bytes follow")
    return length


def _parse(path: Path | str, text: bytes) -> dict[str, object]:
    repeated: list[str] = []

    def collect(pairs: list[tuple[str, object]]) -> dict[str, object]:
        entries: dict[str, object] = {}
        for name, value in pairs:
            if name in entries:
                repeated.append(name)
            entries[name] = value
        return entries

    try:
        entries: object = json.loads(text.decode("utf-8"), object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or a number of too many digits
        raise _damaged(path, f"the header is not JSON in UTF-8 ({error})") from error
    if repeated:
        raise _damaged(path, f"the header has the key {_short(repeated[0])} twice, but keys must be unique")
    if not isinstance(entries, dict):
        raise _damaged(path, f"the header should be a JSON object, but it is a {type(entries).__name__}")
    return cast("dict[str, object]", entries)


def _metadata(path: Path | str, entry: object) -> dict[str, str]:
    if entry is None:
        return {}
    if not isinstance(entry, dict):
        raise _damaged(path, f"__metadata__ should be an object of strings, but it is {_short(entry)}")
    for key, value in cast("dict[str, object]", entry).items():
        if not isinstance(value, str):
            raise _damaged(path, f"__metadata__ should be an object of strings, but {_short(key)} is {_short(value)}")
    return cast("dict[str, str]", entry)


def _tensor(path: Path | str, name: str, entry: object) -> TensorInfo:
    """One entry of the header."""
    check_name(path, name)
    values = cast("dict[str, object]", entry) if isinstance(entry, dict) else {}
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in values]
    if missing:
        raise _damaged(path, f"tensor {name!r} should have dtype, shape and data_offsets, but has no {missing[0]}")
    dtype = values["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _damaged(path, f"tensor {name!r} has dtype {_short(dtype)}, which is none of {', '.join(DTYPES)}")
    shape = _counts(values["shape"])
    if shape is None:
        raise _damaged(
            path, f"tensor {name!r} has shape {_short(values['shape'])}, but sizes are integers from 0 to {MAX_SIZE}"
        )
    span = _counts(values["data_offsets"])
    if span is None or len(span) != 2 or span[0] > span[1]:
        raise _damaged(
            path, f"tensor {name!r} has data_offsets {_short(values['data_offsets'])}, not [begin, end] in this order"
        )
    begin, end = span
    bits = _count_values(shape) * bits_per_value(dtype)
    if bits != 8 * (end - begin):
        needed = f"{bits / 8:.15g}" if bits <= MAX_SIZE else "far more"
        raise _damaged(
            path, f"tensor {name!r} has {end - begin} bytes, but {dtype} of shape {_short(list(shape))} takes {needed}"
        )
    return TensorInfo(dtype, shape, end - begin, begin)


def _counts(entry: object) -> tuple[int, ...] | None:
    values = cast("list[object]", entry) if isinstance(entry, list) else [None]
    counts = tuple(value for value in values if type(value) is int and 0 <= value <= MAX_SIZE)  # True is no count
    return counts if len(counts) == len(values) else None


def _count_values(shape: tuple[int, ...]) -> int:
    """The product; past every possible file just some number that is too large, since a header can be hostile."""
    total = 1
    for size in sorted(shape):  # a 0 comes first
        total *= size
        if total > MAX_SIZE:
            break
    return total


def _check_layout(path: Path | str, tensors: dict[str, TensorInfo], data_bytes: int) -> None:
    """The tensors must cover the bytes after the header exactly: inside the file, no overlap, no gap, nothing left."""
    position, previous = 0, "the header"
    spans = [(info.begin, info.begin + info.nbytes, name) for name, info in tensors.items()]
    for begin, end, name in sorted(spans, key=lambda span: span[:2]):
        if end > data_bytes:
            raise _damaged(
                path, f"tensor {name!r} ends at byte {end} of the data, but the file has only {data_bytes}: truncated"
            )
        if begin != position:
            kind = "overlap" if begin < position else "a gap"
            raise _damaged(
                path, f"tensor {name!r} begins at byte {begin} of the data, but {previous} ends at {position}: {kind}"
            )
        position, previous = end, f"tensor {name!r}"
    if position != data_bytes:
        raise _damaged(
            path, f"the tensors end at byte {position} of the data, but the file has {data_bytes}: trailing bytes"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
