"""A device that is not there is named before anything is read onto it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from refiners.weights.files import read_safetensors, write_safetensors
from refiners.weights.torch_files import read_torch


@pytest.fixture(params=[read_safetensors, read_torch])
def read_onto(request: Any, tmp_path: Path) -> Callable[[Any], dict[str, torch.Tensor]]:
    tensors = {"a": torch.arange(3.0)}
    if request.param is read_safetensors:
        write_safetensors(tmp_path / "x", tensors)
    else:
        torch.save(tensors, tmp_path / "x")
    return lambda device: request.param(tmp_path / "x", device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", torch.device("cuda"), "mps", "nowhere"])
def test_a_device_that_is_not_there_is_named_in_one_short_sentence(read_onto: Any, device: Any) -> None:
    with pytest.raises(RuntimeError) as caught:
        read_onto(device)
    message = str(caught.value)
    assert message.startswith(f"device {str(device)!r} is not available") and message.endswith("try device='cpu'")
    assert len(message) < 350 and "\n" not in message


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")])
def test_a_device_that_is_there_is_read_onto(read_onto: Any, device: Any) -> None:
    assert read_onto(device)["a"].device.type == torch.device(device).type
