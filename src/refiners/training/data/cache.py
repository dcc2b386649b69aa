"""Tensors kept on disk by what they were made of, so that they are made once.

Safe to interrupt and to share: an entry is there whole or not at all, and one that cannot be read is made anew.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from refiners.weights.files import read_safetensors, write_safetensors

MEMORY_LIMIT = 2 * 1024**3  # bytes: beyond it, entries are read from disk each time


class TensorCache:
    """Named tensors by a key; below a folder, or in memory alone if it is None."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._bytes = 0

    def get(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a key, on the CPU; made and kept if they are not there."""
        found = self._memory.get(key)
        if found is None:
            found = self._read(key)
            if found is None:
                found = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
                self._write(key, found)
            self._remember(key, found)
        return found

    def _remember(self, key: str, tensors: dict[str, Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.folder is None or self._bytes + size <= MEMORY_LIMIT:
            self._memory[key] = tensors
            self._bytes += size

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> dict[str, Tensor] | None:
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            return read_safetensors(path)
        except ValueError:
            return None

    def _write(self, key: str, tensors: dict[str, Tensor]) -> None:
        path = self._path(key)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(path, tensors)


def key_of(*parts: str | bytes | int) -> str:
    """A key that follows from all the parts, 40 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=20)
    for part in parts:
        content = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def fingerprint(module: nn.Module) -> str:
    """What tells apart modules of other weights, 40 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=20)
    for name, tensor in module.state_dict().items():
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
