"""Safetensors files in memory: 4-bit values, which torch counts otherwise, and what is left when tensors are gone."""

import gc
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from refiners.weights.files import read_safetensors, write_safetensors


def written(path: Path, shape: list[int]) -> Path:
    """A file with six values of 4 bits."""
    header = json.dumps({"a": {"dtype": "F4", "shape": shape, "data_offsets": [0, 3]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"123")
    return path


def test_values_of_four_bits_come_in_pairs_of_one_row(tmp_path: Path) -> None:
    read = read_safetensors(written(tmp_path / "pairs", [3, 2]))["a"]
    assert read.shape == (3, 1) and bytes(read.view(torch.uint8).flatten().tolist()) == b"123"
    with pytest.raises(ValueError, match=r"'a' of shape \(2, 3\) packs 2 values in a byte across rows"):
        read_safetensors(written(tmp_path / "across", [2, 3]))


def test_reading_leaves_nothing_behind(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {str(index): torch.zeros(1) for index in range(500)})
    blocks, open_files = list[int](), len(os.listdir("/proc/self/fd"))
    for _ in range(4):
        tensors = read_safetensors(tmp_path / "x")
        assert len(os.listdir("/proc/self/fd")) == open_files  # the map needs none
        del tensors
        gc.collect()
        blocks.append(sys.getallocatedblocks())
    assert blocks[-1] - blocks[1] < 500
