"""Files of weights: what is written is read back bit by bit; what is broken or hostile is refused with the reason."""

import inspect
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from refiners.weights import (
    DTYPES,
    MAX_HEADER_BYTES,
    Header,
    TensorInfo,
    files,
    read_header,
    read_metadata,
    read_safetensors,
    read_torch,
    write_safetensors,
)

F32_PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bit pattern, NaNs of all kinds with it; booleans are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    top = 2 if dtype == torch.bool else 256
    return torch.randint(0, top, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and bits(left[name]) == bits(right[name])
        for name in left
    )


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 0, 3), ()], ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_shape_comes_back_bit_by_bit(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    if name == "F4":
        shape = shape or (1,)  # the format counts 4-bit values one by one, so a pair needs a dimension
    tensors = {"first": random_bits(shape, DTYPES[name]), "second": random_bits((3,), DTYPES[name], seed=1)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    assert same(read_safetensors(tmp_path / "x.safetensors"), tensors)
    assert same(load_file(tmp_path / "x.safetensors"), tensors)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
tensor_dicts = st.dictionaries(
    names,
    st.builds(
        random_bits,
        shapes,
        st.sampled_from([dtype for name, dtype in DTYPES.items() if name != "F4"]),
        st.integers(0, 99),
    ),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(tensors=tensor_dicts, metadata=st.none() | st.dictionaries(names, names, max_size=4))
def test_what_is_written_is_read_back(tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write_safetensors(path, tensors, metadata)
        assert same(read_safetensors(path), tensors)
        assert same(load_file(path), tensors)
        assert read_metadata(path) == (metadata or {})
        header = read_header(path)
        assert {name: info.shape for name, info in header.tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in tensors.items()
        }
        assert os.listdir(folder) == ["x.safetensors"]


@settings(max_examples=30, deadline=None)
@given(tensors=tensor_dicts, metadata=st.none() | st.dictionaries(names, names, max_size=4))
def test_files_of_the_safetensors_library_are_read(tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/x", metadata or None)  # 0.8.0 writes no JSON for {} without tensors
        assert same(read_safetensors(f"{folder}/x"), tensors)
        assert read_metadata(f"{folder}/x") == (metadata or {})


def test_header_tells_dtype_shape_bytes_and_metadata(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.bfloat16)}, {"k": "v"})
    header = read_header(tmp_path / "x")
    assert header == Header(
        tensors={"a": TensorInfo("F32", (2, 3), 24, 0), "b": TensorInfo("BF16", (), 2, 24)},
        end=(tmp_path / "x").stat().st_size - 26,
        metadata={"k": "v"},
    )


def test_views_are_written_as_the_values_they_show(tmp_path: Path) -> None:
    grid = torch.arange(12.0).reshape(3, 4)
    z = torch.tensor([1 + 2j, 3 - 4j])
    tensors = {
        "transposed": grid.t(),
        "strided": grid[:, ::2],
        "expanded": torch.ones(1).expand(3, 2),
        "channels_last": torch.arange(16.0).reshape(1, 4, 2, 2).to(memory_format=torch.channels_last),
        "conjugate": z.conj(),
        "negative": z.conj().imag,
        "one negative": z[:1].conj().imag,
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    write_safetensors(tmp_path / "x", tensors)
    read = read_safetensors(tmp_path / "x")
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor), name
        assert read[name].is_contiguous() and not read[name].requires_grad


def test_tensors_that_share_memory_become_independent(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    write_safetensors(tmp_path / "x", {"whole": base, "again": base, "part": base[2:4], "view": base.view(2, 3)})
    read = read_safetensors(tmp_path / "x")
    read["whole"].zero_()
    assert torch.equal(read["again"], base) and torch.equal(read["part"], base[2:4])
    assert torch.equal(read["view"], base.view(2, 3))


def test_same_content_gives_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = {name: random_bits((3,), dtype) for name, dtype in DTYPES.items()}
    metadata = {str(number): str(number) for number in range(9)}
    write_safetensors(tmp_path / "x", tensors, metadata)
    write_safetensors(tmp_path / "y", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_data_of_every_tensor_is_aligned(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"a": random_bits((3,), torch.bool), "b": random_bits((1,), torch.float64)})
    assert all(tensor.data_ptr() % tensor.dtype.itemsize == 0 for tensor in read_safetensors(tmp_path / "x").values())


def test_changing_a_read_tensor_leaves_the_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"a": torch.zeros(4)})
    read_safetensors(tmp_path / "x")["a"].add_(1)
    assert torch.equal(read_safetensors(tmp_path / "x")["a"], torch.zeros(4))


def test_a_file_can_be_written_from_its_own_mapped_tensors(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"a": torch.arange(5.0), "b": torch.ones(2)})
    read = read_safetensors(tmp_path / "x")
    write_safetensors(tmp_path / "x", {"b": read["a"]})
    assert torch.equal(read["a"], torch.arange(5.0)) and torch.equal(read["b"], torch.ones(2))
    assert same(read_safetensors(tmp_path / "x"), {"b": torch.arange(5.0)})


# --- broken files -----------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[object, bytes, str]] = {
    "not JSON": (b"{nonsense", b"", "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not JSON in UTF-8"),
    "nested too deep": (b"[" * 100_000, b"", "not JSON"),
    "number of too many digits": (b'{"a": ' + b"9" * 5000 + b"}", b"", "not JSON"),
    "a list": ([], b"", "JSON object, but it is a list"),
    "duplicate names": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"0",
        "'a' twice",
    ),
    "duplicate fields": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"0", "'dtype' twice"),
    "entry is a number": ({"a": 3}, b"", "no dtype"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, b"", "has no data_offsets"),
    "unknown dtype": ({"a": F32_PAIR | {"dtype": "F33"}}, bytes(8), "dtype 'F33', which is none of BOOL"),
    "dtype is a list": ({"a": F32_PAIR | {"dtype": ["F32"]}}, bytes(8), "dtype"),
    "negative size": ({"a": F32_PAIR | {"shape": [-2]}}, bytes(8), r"shape \[-2\]"),
    "fraction in shape": ({"a": F32_PAIR | {"shape": [2.0]}}, bytes(8), r"shape \[2.0\]"),
    "boolean in shape": ({"a": F32_PAIR | {"shape": [2, True]}}, bytes(8), r"shape \[2, True\]"),
    "shape is a number": ({"a": F32_PAIR | {"shape": 2}}, bytes(8), "shape 2"),
    "huge shape": ({"a": F32_PAIR | {"shape": [2**40, 2**40]}}, bytes(8), "has 8 bytes, but .* takes far more"),
    "hostile shape": ({"a": F32_PAIR | {"shape": [2**62] * 100_000}}, bytes(8), "takes far more"),
    "size beyond 64 bits": ({"a": F32_PAIR | {"shape": [0, 2**63], "data_offsets": [0, 0]}}, b"", "shape"),
    "lying size": ({"a": F32_PAIR | {"shape": [3]}}, bytes(8), r"has 8 bytes, but F32 of shape \[3\] takes 12"),
    "half a byte": ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"0", "takes 1.5"),
    "offsets swapped": ({"a": F32_PAIR | {"data_offsets": [8, 0]}}, bytes(8), r"data_offsets \[8, 0\]"),
    "offsets negative": ({"a": F32_PAIR | {"data_offsets": [-8, 0]}}, bytes(8), "data_offsets"),
    "three offsets": ({"a": F32_PAIR | {"data_offsets": [0, 8, 8]}}, bytes(8), "data_offsets"),
    "overlap": ({"a": F32_PAIR, "b": F32_PAIR | {"data_offsets": [4, 12]}}, bytes(12), "byte 4 .* ends at 8: overlap"),
    "same bytes twice": ({"a": F32_PAIR, "b": F32_PAIR}, bytes(8), "overlap"),
    "gap": ({"a": F32_PAIR, "b": F32_PAIR | {"data_offsets": [9, 17]}}, bytes(17), "byte 9 .* ends at 8: a gap"),
    "gap at the start": ({"a": F32_PAIR | {"data_offsets": [1, 9]}}, bytes(9), "the header ends at 0: a gap"),
    "truncated": ({"a": F32_PAIR}, bytes(7), "byte 8 .* only 7: truncated"),
    "trailing bytes": ({"a": F32_PAIR}, bytes(9), "byte 8 .* has 9: trailing"),
    "trailing bytes, no tensors": ({}, b"0", "trailing"),
    "metadata is a list": ({"__metadata__": ["a"]}, b"", "__metadata__ should be an object of strings"),
    "metadata holds a number": ({"__metadata__": {"step": 1}}, b"", "'step' is 1"),
}


@pytest.mark.parametrize("read", [read_header, read_safetensors, read_metadata])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_refused_with_path_and_reason(case: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    header, data, reason = BROKEN[case]
    path = write_raw(tmp_path / "broken.safetensors", header, data)
    with pytest.raises(ValueError, match=reason) as caught:
        read(path)
    assert str(path) in str(caught.value) and "get it again" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "has 0 bytes"),
        (b"1234", "has 4 bytes"),
        ((100).to_bytes(8, "little") + b"{}", "header of 100 bytes, but only 2"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", f"header of {MAX_HEADER_BYTES + 1} bytes"),
        (b"\xff" * 20, "header of 18446744073709551615 bytes"),
        (b"PK\x03\x04" + b"\x08" * 20, "zip archive.*read_torch"),
        (b"\x80\x02" + b"\x8a" * 20, "pickle.*read_torch"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\x89PNG\r\n\x1a\n" + b"\x00" * 20, "picture"),
        (b"\xff\xd8\xff\xe0" + b"\xff" * 20, "picture"),
    ],
)
def test_file_without_a_header_is_refused_and_named(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_safetensors(tmp_path / "x")


def test_a_good_header_may_begin_like_another_kind_of_file(tmp_path: Path) -> None:
    length = 256 + ord("<")
    path = write_raw(tmp_path / "x", json.dumps({"a": F32_PAIR}).encode().ljust(length), bytes(8))
    assert path.read_bytes()[:1] == b"<"
    assert read_safetensors(path)["a"].shape == (2,)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_reads_like_in_the_safetensors_library(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        write_safetensors(path, {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.float16)}, {"k": "v"})
        content = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[position] = data.draw(st.integers(0, 255))
        else:
            del content[position]
        path.write_bytes(content)
        try:
            read = read_safetensors(path)
        except ValueError:
            return
        assert same(read, load_file(path))


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, 200))
def test_a_file_cut_anywhere_is_refused(cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        write_safetensors(path, {"a": torch.arange(30.0)})
        content = path.read_bytes()
        path.write_bytes(content[: max(0, len(content) - cut)])
        with pytest.raises(ValueError):
            read_safetensors(path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "x", "wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(2 * MAX_HEADER_BYTES)  # sparse
    with pytest.raises(ValueError, match=f"at most {MAX_HEADER_BYTES}"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize("read", [read_header, read_safetensors, read_metadata, read_torch])
def test_missing_file_and_directory_are_named(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent: there is no such file"):
        read(tmp_path / "absent")
    with pytest.raises(IsADirectoryError, match="this is a directory"):
        read(tmp_path)


def test_unknown_device_is_a_clear_error(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"a": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="device 'nowhere'"):
        read_safetensors(tmp_path / "x", device="nowhere")
    assert read_safetensors(tmp_path / "x", device=torch.device("cpu"))["a"].device.type == "cpu"


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["tensor", "fsync", "replace", "interrupt"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"old": torch.ones(3)})
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt if step == "interrupt" else OSError(28, "No space left on device")

    owner, name = {"fsync": (os, "fsync"), "replace": (os, "replace")}.get(step, (files, "_bytes_of"))
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises((OSError, KeyboardInterrupt)) as caught:
        write_safetensors(path, {"new": torch.zeros(1000)})
    assert step == "interrupt" or str(caught.value) == f"[Errno 28] No space left on device: {str(path)!r}"
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(1, dtype=torch.complex128), "complex128"),
        (torch.eye(2).to_sparse(), "to_dense"),
        (torch.zeros(2, device="meta"), "meta device"),
        (torch.zeros((), dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "reshape"),
    ],
    ids=["dtype", "sparse", "meta", "4 bits"],
)
def test_tensor_that_the_format_cannot_hold_is_refused(tensor: Tensor, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"'odd'.*{reason}"):
        write_safetensors(tmp_path / "x", {"fine": torch.zeros(1), "odd": tensor})
    assert not os.listdir(tmp_path)


def test_names_and_metadata_must_be_strings(tmp_path: Path) -> None:
    write = inspect.unwrap(write_safetensors)  # without the type checks that a test run may put around it
    with pytest.raises(TypeError, match=r"'step': 3 has a int.*str\(\)"):
        write(tmp_path / "x", {}, metadata={"step": 3})
    with pytest.raises(TypeError, match="3: 'step' has a int"):
        write(tmp_path / "x", {}, metadata={3: "step"})
    with pytest.raises(TypeError, match="'step' is a int, but a safetensors file holds only tensors"):
        write(tmp_path / "x", {"step": 3})
    with pytest.raises(TypeError, match="name 3 is a int"):
        write(tmp_path / "x", {3: torch.zeros(1)})
    with pytest.raises(ValueError, match="__metadata__"):
        write_safetensors(tmp_path / "x", {"__metadata__": torch.zeros(1)})
    with pytest.raises(ValueError, match="UTF-8"):
        write_safetensors(tmp_path / "x", {"\ud800": torch.zeros(1)})
    assert not os.listdir(tmp_path)


def test_writing_into_a_missing_folder_or_onto_a_directory_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent' does not exist; create it"):
        write_safetensors(tmp_path / "absent" / "x", {})
    with pytest.raises(IsADirectoryError, match="this is a directory"):
        write_safetensors(tmp_path, {})


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions and links")
def test_permissions_and_links_stay(tmp_path: Path) -> None:
    path, link, plain = tmp_path / "x", tmp_path / "link", tmp_path / "plain"
    plain.touch()
    write_safetensors(path, {})
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o600)
    link.symlink_to(path)
    write_safetensors(link, {"a": torch.ones(1)})
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o600
    assert same(read_safetensors(path), {"a": torch.ones(1)})


# --- torch files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("nested", [True, False], ids=["state_dict", "top"])
def test_torch_file_of_tensors_comes_back_bit_by_bit(as_zip: bool, nested: bool, tmp_path: Path) -> None:
    without_storage_type = (
        () if as_zip else ("U16", "U32", "U64", "F4", "F8")
    )  # torch's legacy format has none of these
    tensors = {
        name: random_bits((2, 3), dtype) for name, dtype in DTYPES.items() if not name.startswith(without_storage_type)
    }
    content = {"state_dict": tensors, "epoch": 3, "global_step": 7000} if nested else tensors
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=as_zip)
    assert same(read_torch(tmp_path / "x.ckpt"), tensors)


def test_parameters_in_a_torch_file_come_back_as_plain_tensors(tmp_path: Path) -> None:
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, tmp_path / "x.pt")
    read = read_torch(tmp_path / "x.pt")["a"]
    assert type(read) is Tensor and not read.requires_grad


class Hostile:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.witness),)


def test_the_hostile_pickle_would_run_if_it_were_loaded_unsafely(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Hostile(tmp_path / "witness")))
    assert (tmp_path / "witness").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle 2", "pickle 4"])
def test_code_in_a_torch_file_is_refused_and_does_not_run(form: str, tmp_path: Path) -> None:
    path, witness = tmp_path / "x.pt", tmp_path / "witness"
    content = {"state_dict": {"a": torch.zeros(1)}, "extra": Hostile(witness)}
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(Hostile(witness), protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"code.*safetensors") as caught:
        read_torch(path)
    assert not witness.exists()
    assert "weights_only" not in str(caught.value)
    if form in ("zip", "legacy"):
        assert "wants to run code (posix.mkdir)" in str(caught.value).replace("nt.mkdir", "posix.mkdir")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (torch.zeros(2), "the file should hold a dict of tensors, but it is a Tensor"),
        ([torch.zeros(2)], "is a list"),
        ({"a": torch.zeros(1), "step": 3}, r"1 of 2 entries are not \(first: 'step' is a int\)"),
        ({"model": {"a": torch.zeros(1)}}, "'model' is a dict"),
        ({"state_dict": {"a": torch.zeros(1), "b": {"c": torch.zeros(1)}}}, "its state_dict .*'b' is a dict"),
        ({0: torch.zeros(1)}, "1 of 1 entries"),
    ],
)
def test_torch_file_of_other_things_is_refused_saying_what_it_holds(
    content: object, found: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=found) as caught:
        read_torch(tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in str(caught.value)


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_a_torch_file_cut_anywhere_is_refused(as_zip: bool, tmp_path: Path) -> None:
    torch.save({"a": torch.arange(100.0)}, tmp_path / "x.pt", _use_new_zipfile_serialization=as_zip)
    content = (tmp_path / "x.pt").read_bytes()
    for length in range(0, len(content) - 1, 29):
        (tmp_path / "y.pt").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"y\.pt: "):
            read_torch(tmp_path / "y.pt")


def test_each_reader_names_the_other_for_its_files(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="read_torch"):
        read_safetensors(tmp_path / "x.pt")
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="read_safetensors"):
        read_torch(tmp_path / "x.safetensors")


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")
def test_torchscript_is_refused_as_code(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:  # what torch.load looks at
        archive.writestr("x/constants.pkl", pickle.dumps((), protocol=2))
        archive.writestr("x/version", "3\n")
    with pytest.raises(ValueError, match=r"run code \(a TorchScript program\)"):
        read_torch(tmp_path / "x.pt")
