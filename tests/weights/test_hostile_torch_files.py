"""Torch files made to run code, to hang or to fill the memory: refused at once, with the reason, in little memory."""

import io
import os
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from refiners.weights import read_safetensors, read_torch
from refiners.weights.header import MAX_NAME
from refiners.weights.lora_keys import read_lora
from refiners.weights.pickles import MAX_PICKLE_BYTES, check_pickles

MAX_SECONDS, MAX_BYTES = 2.0, 60_000_000
START, END = b"\x80\x02}", b"K\x01s."  # an empty dict, that a value of 1 is put into


def doubled(times: int) -> bytes:
    """A tuple of twice the same tuple of twice the same tuple …"""
    steps = b"".join(b"h" + bytes([number]) + b"\x86q" + bytes([number + 1]) for number in range(times))
    return START + b"K\x01K\x01\x86q\x00" + steps + END


def called(name: str, argument: bytes) -> bytes:
    return START + b"X\x01\x00\x00\x00a" + f"c{name}\n".encode().replace(b".", b"\n") + argument + b"\x85Rs."


PICKLES: dict[str, tuple[bytes, str]] = {
    "tuples that take 2^60 steps to hash": (doubled(60), "a tuple of more than 1000 things"),
    "tuples as deep as the stack": (START + b"K\x01" + b"\x85" * 2_000_000 + END, "a tuple of more than 1000 things"),
    "a deep repr": (START + b"K\x01" + b"\x85" * 1500 + END, "a tuple of more than 1000 things"),
    "a huge array of bytes": (
        called("builtins.bytearray", b"J\xff\xff\xff\x7f"),
        r"to run code \(builtins.bytearray\)",
    ),
    "a tensor that was never written": (
        called("torch.FloatTensor", b"J\xff\xff\xff\x7f"),
        r"run code \(torch.FloatTensor",
    ),
    "a system call": (called("os.system", b"X\x02\x00\x00\x00ls"), r"to run code \(os.system\)"),
    "a text as long as the disk": (START + b"X\xff\xff\xff\x7f" + b"ab", "its pickle is damaged: expected 2147483647"),
    "a memo that was never filled": (START + b"h\x07" + END, "its pickle is damaged: 7"),
    "an empty stack": (b"\x80\x02\x86.", "it takes from an empty stack"),
    "no mark": (b"\x80\x02t.", "its pickle is damaged"),
    "no end": (START, "its pickle is damaged"),
    "nothing": (b"", "its pickle is damaged"),
}


def zipped(path: Path, pickle: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """An archive as torch makes them, of this pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return path


def refused(path: Path, reason: str) -> None:
    start = time.process_time()
    tracemalloc.start()
    try:
        for read in (read_torch, read_lora):
            with pytest.raises(ValueError, match=reason) as caught:
                read(path)
            assert str(path) in str(caught.value) and len(str(caught.value)) < 1000
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < MAX_SECONDS


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_pickle_is_refused_before_it_is_loaded(name: str, is_zip: bool, tmp_path: Path) -> None:
    pickle, reason = PICKLES[name]
    path = tmp_path / "x.bin"
    if is_zip:
        refused(zipped(path, pickle), reason)
    elif pickle:
        path.write_bytes(pickle)
        refused(path, reason)


def test_parameters_that_hold_none_are_refused(tmp_path: Path) -> None:
    pickle = START + b"X\x01\x00\x00\x00actorch.nn.modules.container\nParameterDict\n)\x81K\x01bs."
    refused(zipped(tmp_path / "x.bin", pickle), "a ParameterDict without its parameters")


def test_a_packed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.bin", bytes(50_000_000), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    refused(path, "'archive/data.pkl' is compressed")


def test_an_archive_with_an_endless_pickle_is_refused_unread(tmp_path: Path) -> None:
    refused(zipped(tmp_path / "x.bin", bytes(MAX_PICKLE_BYTES + 1)), "a pickle of 10000001 bytes, over 10000000")


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_few_numbers_that_claim_to_be_many_are_refused(is_zip: bool, tmp_path: Path) -> None:
    tensors = {"a": torch.ones(1).expand(10**6, 10**6)}
    torch.save(tensors, tmp_path / "x.bin", _use_new_zipfile_serialization=is_zip)
    refused(tmp_path / "x.bin", "come to 4000000000000 bytes, but the file has")


def test_the_same_weights_under_two_names_are_no_reason_to_refuse(tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    torch.save({"embedding": weight, "head": weight}, tmp_path / "x.bin")
    assert torch.equal(read_torch(tmp_path / "x.bin")["head"], weight)


@pytest.mark.parametrize(
    ("tensor", "function"),
    [
        (torch.ones(9, 9, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (torch.eye(3).to_sparse(), "_rebuild_sparse_tensor"),
    ],
    ids=["meta", "sparse"],
)
def test_tensors_without_plain_values_are_refused(tensor: torch.Tensor, function: str, tmp_path: Path) -> None:
    torch.save({"a": tensor}, tmp_path / "x.bin")
    refused(tmp_path / "x.bin", function)


def test_names_longer_than_any_model_has_are_refused_in_short(tmp_path: Path) -> None:
    torch.save({"x" * (MAX_NAME + 1): torch.ones(1)}, tmp_path / "x.bin")
    refused(tmp_path / "x.bin", "a tensor has a name of 1001 characters, over 1000: 'xxx")


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_what_training_code_saves_beside_the_weights_is_no_reason_to_refuse(is_zip: bool, tmp_path: Path) -> None:
    weights: dict[str, torch.Tensor] = torch.nn.Linear(3, 2).half().state_dict()  # an OrderedDict with attributes
    content = {"state_dict": weights, "size": torch.Size([1, 2]), "device": torch.device("cpu"), "betas": (0.9, 0.99)}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=is_zip)
    assert torch.equal(read_torch(tmp_path / "x.ckpt")["bias"], weights["bias"])


def test_the_check_takes_less_time_than_loading_a_model_of_a_thousand_tensors() -> None:
    stream = io.BytesIO()
    torch.save({f"down_blocks.{number}.weight": torch.ones(1) for number in range(1000)}, stream)
    pickle = zipfile.ZipFile(stream).read("archive/data.pkl")
    start = time.process_time()
    check_pickles("x", pickle, 1)
    assert time.process_time() - start < 1.0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "adapter_config.json")
    for path, read in ((tmp_path, read_lora), (tmp_path / "adapter_config.json", read_safetensors)):
        with pytest.raises(ValueError, match="this is a pipe or a device"):
            read(path)
