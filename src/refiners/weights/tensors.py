"""Tensors of a file, whichever of the two kinds it is."""

from pathlib import Path

from torch import Tensor

from refiners.weights.files import read_safetensors
from refiners.weights.torch_files import is_torch_file, read_torch


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """Read a safetensors file, or a torch file that holds a dict of tensors; memory-mapped where possible.

    Raises ValueError if it is damaged or another kind of file, FileNotFoundError, IsADirectoryError.
    """
    return read_torch(path) if is_torch_file(path) else read_safetensors(path)
