"""Mutated LoRA files: a clear error that names the file or a LoRA that comes off again, and never anything else."""

import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_specimens import CONTENTS, LINEAR, SETTINGS, random_parts, split_file, write_peft, write_raw, write_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_specimens import load_both, outputs, write
from torch import Tensor

from refiners.foundationals.latent_diffusion.lora import LoraWeights, convert_lora, inspect_lora
from refiners.weights import DTYPES

MAX_SECONDS = 2.0
MAX_MESSAGE = 3000
fast, thorough = settings(max_examples=10, deadline=None), settings(max_examples=100, deadline=None)
contents = st.sampled_from(sorted(CONTENTS))


KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def peak_bytes() -> int:
    """The most memory that this process has had so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Target:
    """A model, and whether it is as it was."""

    def __init__(self) -> None:
        self.model: Any = load_both()[0]
        self.outputs = outputs(self.model)
        self.modules = self._modules()
        self.state = {name: tensor.clone() for name, tensor in self._state().items()}

    def _modules(self) -> list[tuple[str, torch.nn.Module]]:
        return [item for tree in (self.model.unet, self.model.clip_text_encoder) for item in tree.named_modules()]

    def _state(self) -> dict[str, Tensor]:
        return {**self.model.unet.state_dict(), **self.model.clip_text_encoder.state_dict(prefix="text.")}

    def assert_unchanged(self, has_outputs: bool = False) -> None:
        now = self._state()
        assert self._modules() == self.modules and now.keys() == self.state.keys()
        assert all(
            torch.equal(tensor.view(torch.uint8), now[name].view(torch.uint8)) for name, tensor in self.state.items()
        )
        if has_outputs:
            assert all(torch.equal(a, b) for a, b in zip(outputs(self.model), self.outputs, strict=True))


@pytest.fixture(scope="module")
def target() -> Target:
    return Target()


@pytest.fixture(autouse=True)
def unchanged(target: Target) -> Iterator[None]:
    yield
    target.assert_unchanged(has_outputs=True)


def attach(target: Target, path: Path, strict: bool) -> None:
    weights = LoraWeights(path)
    report = weights.patch(target.model, strict=strict)
    assert report.attached and (not strict or not report.left_out)
    outputs(target.model)
    weights.eject()


def survives(target: Target, path: Path, strict: bool = True) -> bool:
    """Whether a file could be used. Whatever is in it, all that reads it holds to what it promises."""
    start = time.process_time()
    uses: list[Callable[[], object]] = [
        lambda: attach(target, path, strict),
        lambda: str(inspect_lora(path)),
        lambda: str(inspect_lora(path, target.model)),
        lambda: convert_lora(path, path.parent / "converted.safetensors", target.model),
    ]
    results: list[bool] = []
    for use in uses:
        try:
            use()
        except (ValueError, FileNotFoundError) as error:
            assert str(path) in str(error), error
            assert len(str(error)) < MAX_MESSAGE and str(error).isprintable(), error
            results.append(False)
        else:
            results.append(True)
    target.assert_unchanged()
    assert time.process_time() - start < MAX_SECONDS * len(uses)
    return results[0]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Bytes cut, changed, doubled or filled up anywhere, and most of all at the start, where the sizes are."""
    end = max(1, len(content) - 1)
    at = data.draw(st.integers(0, min(300, end)) | st.integers(0, end))
    new = data.draw(st.binary(min_size=1, max_size=9) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"9" * 20, b"[" * 99]))
    change = data.draw(st.sampled_from(["cut", "overwrite", "insert", "delete", "double"]))
    return {
        "cut": content[:at],
        "overwrite": content[:at] + new + content[at + len(new) :],
        "insert": content[:at] + new + content[at:],
        "delete": content[:at] + content[at + len(new) :],
        "double": content[: at + 40] + content[at:],
    }[change]


def check_damaged_bytes(target: Target, data: st.DataObject) -> None:
    tensors = CONTENTS[data.draw(contents)]()
    form = data.draw(st.sampled_from(["safetensors", "zip", "legacy"]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.bin"
        if form == "safetensors":
            write(path, tensors)
        else:
            write_torch(path, tensors, form == "zip")
        path.write_bytes(damaged(data, path.read_bytes()))
        survives(target, path)


SIZES = st.sampled_from([0, 1, 3, 64, 2**31, 2**62, 2**63, 2**64, 10**40, -1]) | st.integers(-5, 2**40)
NAMES = st.text(max_size=12) | st.sampled_from(
    [
        "\ud800",
        "a\0b",
        "\x1b[31m",
        "../../etc/passwd",
        "." * 500,
        "a." * 500,
        "x" * 10**6,
        "lora_unet_" * 90,
        "__class__",
    ]
)


def check_lying_header(target: Target, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "lora.safetensors", CONTENTS[data.draw(contents)]())
        header, bytes_behind = split_file(path)
        for _ in range(data.draw(st.integers(1, 2))):
            entry = header[data.draw(st.sampled_from(sorted(header)))]
            change = data.draw(st.sampled_from(["shape", "offsets", "dtype", "name", "entry", "metadata"]))
            if change == "shape":
                entry["shape"] = data.draw(st.lists(SIZES, max_size=4))
            elif change == "offsets":
                entry["data_offsets"] = data.draw(st.lists(SIZES, min_size=2, max_size=3))
            elif change == "dtype":
                entry["dtype"] = data.draw(st.sampled_from([*DTYPES, "F7", ""]))
            elif change == "name":
                header[data.draw(NAMES)] = entry
            elif change == "entry":
                entry[data.draw(NAMES)] = data.draw(JSON)
            else:
                header["__metadata__"] = {"lora_adapter_metadata": data.draw(st.text(max_size=9) | SETTINGS_TEXT)}
        length = data.draw(st.none() | st.sampled_from([0, 2**31, 2**63, 2**64 - 1]))
        write_raw(path, json.dumps(header), bytes_behind, length)
        survives(target, path)


def with_setting(key: str, value: object) -> str:
    return json.dumps(SETTINGS | {key: value})


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(10**400), 10**400) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SETTINGS_TEXT = st.builds(
    with_setting,
    st.sampled_from(
        ["lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights", "peft_type", "unet.lora_alpha", "bias"]
    ),
    JSON | st.dictionaries(st.text(max_size=9), JSON, max_size=2),
)


def check_settings(target: Target, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        survives(target, write_peft(Path(folder) / "adapter", data.draw(SETTINGS_TEXT)))


def _changed(data: st.DataObject, tensor: Tensor) -> Tensor:
    value = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0, -3.0, 1e30, 3.4e38]))
    change = data.draw(st.sampled_from(["fill", "one", "cast", "flat", "shape", "transpose", "wide", "empty"]))
    flat = tensor.reshape(-1)
    if change == "cast":
        dtype = data.draw(st.sampled_from(list(DTYPES.values())))
        if dtype.itemsize == 1 and "float4" in str(dtype):
            return flat.to(torch.uint8).view(dtype)
        return tensor.to(dtype)
    changes: dict[str, Callable[[], Tensor]] = {
        "fill": lambda: torch.full_like(tensor.float(), value),
        "one": lambda: flat.float().index_fill(0, torch.tensor([0]), value).reshape(tensor.shape),
        "flat": lambda: flat,
        "shape": lambda: tensor.new_zeros(data.draw(st.lists(st.integers(0, 65), max_size=3))),
        "transpose": lambda: tensor.mT if tensor.ndim > 1 else tensor[None],
        "wide": lambda: 1e300 * tensor.double(),
        "empty": lambda: flat[:0],
    }
    return changes[change]()


def check_changed_tensors(target: Target, data: st.DataObject) -> None:
    tensors = CONTENTS[data.draw(contents)]()
    for _ in range(data.draw(st.integers(1, 2))):
        key, other = (data.draw(st.sampled_from(sorted(tensors))) for _ in range(2))
        change = data.draw(st.sampled_from(["value", "swap", "rename", "drop", "end"]))
        if change == "value":
            tensors[key] = _changed(data, tensors[key])
        elif change == "swap":
            tensors[key], tensors[other] = tensors[other], tensors[key]
        elif change == "rename":
            tensors[data.draw(NAMES).replace("\ud800", "") + data.draw(st.sampled_from(["", f".{key}"]))] = tensors.pop(
                key
            )
        elif change == "end":
            tensors[f"{key.partition('.')[0]}.{other.partition('.')[2]}.weight"] = tensors[key]
        elif len(tensors) > 1:
            del tensors[key]
    strict = data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as folder:
        survives(target, write(Path(folder) / "lora.safetensors", tensors), strict)


CHECKS = {
    "bytes": check_damaged_bytes,
    "header": check_lying_header,
    "settings": check_settings,
    "tensors": check_changed_tensors,
}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_file_of_the_corpus_loads_as_it_is(target: Target, folder: Path, name: str) -> None:
    assert survives(target, write(folder / "lora.safetensors", CONTENTS[name]()))


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_torch_files_of_the_corpus_load_as_they_are(target: Target, folder: Path, is_zip: bool) -> None:
    assert survives(target, write_torch(folder / "lora.bin", CONTENTS["mixed"](), is_zip))


def test_an_adapter_folder_of_the_corpus_loads_as_it_is(target: Target, folder: Path) -> None:
    assert survives(target, write_peft(folder / "adapter"))


@pytest.mark.parametrize("check", CHECKS)
def test_a_mutated_file_is_refused_by_name_or_comes_off_again(target: Target, check: str) -> None:
    @fast
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        CHECKS[check](target, data)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_many_mutated_files_are_refused_by_name_or_come_off_again(target: Target, check: str) -> None:
    @thorough
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        CHECKS[check](target, data)

    run()


# -- bombs

BOMBS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "LoRA": ({"lora_down.weight": (1, 10**6), "lora_up.weight": (10**6, 1)}, "do not fit the linear"),
    "LoHa": (
        {f"hada_w{n}_{x}": size for n in "12" for x, size in (("a", (10**6, 1)), ("b", (1, 10**6)))},
        "it should be",
    ),
    "LoKr": ({"lokr_w1": (1000, 1000), "lokr_w2": (1000, 1000)}, "do not divide"),
    "GLoRA": (
        {"a1.weight": (64, 1), "a2.weight": (1, 64), "b1.weight": (10**6, 1), "b2.weight": (1, 10**6)},
        "it should be",
    ),
    "elementwise GLoRA": ({"glora_A.Xd": (10**6, 1), "glora_A.Xu": (1, 10**6)}, "make up no A"),
    "OFT": ({"oft_blocks": (10**6, 1, 1)}, "does not fit"),
    "difference": ({"diff": (1000, 1000)}, "that of the layer"),
    "IA3": ({"weight": (10**6,), "on_input": ()}, "its numbers have shape"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_factors_of_a_huge_product_are_refused_without_it(target: Target, folder: Path, name: str) -> None:
    shapes, reason = BOMBS[name]
    path, before = write(folder / "lora.safetensors", random_parts(LINEAR, shapes)), peak_bytes()
    for strict in (True, False):
        with pytest.raises(ValueError, match=reason):
            LoraWeights(path).patch(target.model, strict=strict)
    assert not survives(target, path)
    assert peak_bytes() - before < 100_000_000


def test_a_huge_file_is_inspected_without_its_weights(target: Target, folder: Path) -> None:
    half = 2**30
    entries = {
        f"{KEY}.lora_{part}.weight": {"dtype": "F16", "shape": shape, "data_offsets": [begin, begin + half]}
        for part, shape, begin in (("down", [2**23, 64], 0), ("up", [64, 2**23], half))
    }
    path = write_raw(folder / "lora.safetensors", json.dumps(entries), b"")
    with open(path, "ab") as file:
        file.truncate(file.tell() + 2 * half)  # sparse
    start, before = time.process_time(), peak_bytes()
    inspection = inspect_lora(path, target.model)
    assert time.process_time() - start < 1.0 and peak_bytes() - before < 100_000_000
    assert inspection.dtypes == {torch.float16: 2} and inspection.ranks == {2**23: 1}
    assert "number formats: float16 in 2 tensors" in str(inspection)


def test_thousands_of_unknown_names_take_no_time(target: Target, folder: Path) -> None:
    names = [f"lora_unet_{'down_blocks_9_' * (number % 20)}{number}.lora_up.weight" for number in range(1000)]
    assert not survives(target, write(folder / "lora.safetensors", {name: torch.ones(1) for name in names}))


@pytest.mark.parametrize("targets", ["self," * 100_000, "self,Attention", "Attention," * 5, "__class__", ",", "\0"])
def test_layers_in_order_are_of_known_classes_and_each_is_there_once(
    target: Target, folder: Path, targets: str
) -> None:
    tensors = {f"unet.{number:03}": torch.ones(64, 64) for number in range(4)}
    assert not survives(target, write(folder / "lora.safetensors", tensors, {"unet_targets": targets}))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_number_formats_of_files_are_told_and_read(target: Target, folder: Path, dtype: torch.dtype) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in CONTENTS["LoHa"]().items()}
    path = write(folder / "lora.safetensors", tensors)
    assert inspect_lora(path).dtypes == {dtype: 4} and inspect_lora(path).ranks == {3: 1}
    assert survives(target, path)


def test_values_out_of_the_range_of_the_model_are_refused_by_name(target: Target, folder: Path) -> None:
    tensors = CONTENTS["LoRA"]()
    tensors[f"{KEY}.lora_up.weight"] = 1e300 * tensors[f"{KEY}.lora_up.weight"].double()
    path = write(folder / "lora.safetensors", tensors)
    with pytest.raises(ValueError, match=f"{path}: in torch.float32 the up of '{KEY}' has values that are NaN or inf"):
        LoraWeights(path).patch(target.model)


COUNTS = {
    "two": torch.ones(2, dtype=torch.bool),
    "none": torch.ones(0),
    "complex": torch.ones(1, dtype=torch.complex64),
    "4 bits": torch.zeros(1, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "unsigned": torch.tensor(3, dtype=torch.uint64),
    "NaN": torch.tensor(float("nan")),
    "infinite": torch.tensor(float("inf")),
    "negative": torch.tensor(-1),
    "endless": torch.tensor(2**40),
}


@pytest.mark.parametrize("part", ["on_input", "oft_terms"])
@pytest.mark.parametrize("name", COUNTS)
def test_a_part_that_counts_is_one_number_within_bounds(target: Target, folder: Path, name: str, part: str) -> None:
    tensors = CONTENTS["IA3" if part == "on_input" else "OFT"]()
    tensors[f"{KEY}.{part}"] = COUNTS[name]
    assert not survives(target, write(folder / "lora.safetensors", tensors))
