"""LoRA files that are damaged, hostile or of something else: one clear sentence, and a model that has not changed."""

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_specimens import Models, kohya_tensors, load_both, outputs, random_factors, write
from torch import Tensor

from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.latent_diffusion.lora import LoraWeights, inspect_lora

Tensors = dict[str, Tensor]
FIRST = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module")
def models() -> Models:
    """Shared, since no test may change it."""
    return load_both()


@pytest.fixture(scope="module")
def before(models: Models) -> tuple[Tensor, Tensor]:
    return outputs(models[0])


@pytest.fixture
def tensors(models: Models) -> Tensors:
    factors = random_factors(models[1], lambda component, name: name.startswith("mid_block") and "attn" in name, rank=3)
    return kohya_tensors(factors)


@pytest.fixture(autouse=True)
def unchanged(models: Models) -> Iterator[None]:
    """The very same modules sit in the trees after each test."""
    ours, _ = models
    trees = [list(tree.named_modules()) for tree in (ours.unet, ours.clip_text_encoder)]
    yield
    assert [list(tree.named_modules()) for tree in (ours.unet, ours.clip_text_encoder)] == trees


def assert_unchanged(sd15: Any, before: tuple[Tensor, Tensor]) -> None:
    assert sd15.unet.find(LoraAdapter) is None and sd15.clip_text_encoder.find(LoraAdapter) is None
    assert all(torch.equal(now, then) for now, then in zip(outputs(sd15), before, strict=True))


def refused(models: Models, path: Path, match: str, kind: type[Exception] = ValueError, **options: Any) -> None:
    with pytest.raises(kind, match=match):
        LoraWeights(path).patch(models[0], **options)


def change(**changes: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        for part, function in changes.items():
            tensors[f"{FIRST}.{part}"] = function(tensors[f"{FIRST}.{part}"])

    return apply


def swap(tensors: Tensors) -> None:
    for name in {key.partition(".")[0] for key in tensors}:
        down, up = f"{name}.lora_down.weight", f"{name}.lora_up.weight"
        tensors[down], tensors[up] = tensors[up], tensors[down]


def with_nan(tensor: Tensor) -> Tensor:
    return tensor.index_fill(1, torch.tensor([1]), float("nan"))


CHANGES: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "NaN": (change(**{"lora_up.weight": with_nan}), "the up of .*_to_q' has values that are NaN"),
    "infinity": (change(**{"lora_down.weight": lambda x: x / 0}), "the down of .* NaN or infinite"),
    "NaN alpha": (change(alpha=lambda x: x * float("nan")), "alpha' is nan, but an alpha must be finite"),
    "long alpha": (change(alpha=lambda x: x.expand(2).clone()), r"should be one number, but it has shape \(2,\)"),
    "swapped": (swap, "down and up are swapped"),
    "rank": (change(**{"lora_up.weight": lambda x: x[:, :2].clone()}), "down is of rank 3, up of rank 2"),
    "width": (change(**{"lora_down.weight": lambda x: x[:, :-1].clone()}), r"down \(3, 63\).* do not fit the linear"),
    "no dimension": (change(**{"lora_down.weight": lambda x: x.sum()}), r"down \(\)"),
    "empty": (change(**{"lora_down.weight": lambda x: x[:0].clone()}), "so it is empty"),
    "whole numbers": (change(**{"lora_up.weight": lambda x: x.to(torch.int32)}), "up is torch.int32, but it should be"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("strict", [True, False])
def test_values_and_shapes_that_cannot_be(
    models: Models, tensors: Tensors, tmp_path: Path, name: str, strict: bool
) -> None:
    apply, message = CHANGES[name]
    apply(tensors)
    refused(models, write(tmp_path / "a.safetensors", tensors), message, strict=strict)


def test_a_name_that_is_not_known_is_named_with_its_nearest(models: Models, tensors: Tensors, tmp_path: Path) -> None:
    for part in ("lora_down.weight", "lora_up.weight", "alpha"):
        tensors[f"{FIRST.replace('attn1', 'atn1')}.{part}"] = tensors.pop(f"{FIRST}.{part}")
    path = write(tmp_path / "a.safetensors", tensors)
    refused(
        models, path, f"3 of {len(tensors)} keys cannot be used here, the first is .*nearest known name is '{FIRST}'"
    )
    weights = LoraWeights(path)
    report = weights.patch(models[0], strict=False)
    weights.eject()
    assert [left.nearest for left in report.left_out] == [FIRST] * 3
    assert len(report.attached) == len(tensors) // 3 - 1


@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight"])
def test_half_an_update_is_an_error(models: Models, tensors: Tensors, tmp_path: Path, part: str) -> None:
    del tensors[f"{FIRST}.{part}"]
    message = f"'{FIRST}' has no {part.split('_')[1].split('.')[0]} in this file"
    refused(models, write(tmp_path / "a.safetensors", tensors), message)


KINDS = {
    "VeRA": ["vera_lambda_b", "vera_lambda_d"],
    "LoRA with a learned scale": ["lora_down.weight", "lora_up.weight", "scalar"],
    "LoRA with a bias": ["lora_up.bias"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_updates_are_named_and_never_dropped(
    models: Models, tensors: Tensors, tmp_path: Path, kind: str
) -> None:
    other = FIRST.replace("attn1", "attn2")
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(other)}
    added = {f"{other}.{part}": torch.ones(3, 3) for part in KINDS[kind]} | {f"{other}.alpha": torch.tensor(1.0)}
    path = write(tmp_path / "a.safetensors", tensors | added)
    refused(models, path, f"{len(added)} of .* keys .*{kind} is a kind of update that cannot be loaded")
    weights = LoraWeights(path)
    report = weights.patch(models[0], strict=False)
    weights.eject()
    assert {left.key for left in report.left_out} == set(added)


def test_a_file_with_nothing_to_attach(models: Models, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {f"{FIRST}.hada_w1_a": torch.ones(2)})
    refused(models, path, "has no w1_b and no w2_a and no w2_b in this file", strict=False)
    custom = {"unet.mid_block.attn2.processor.to_k_custom_diffusion.weight": torch.ones(2, 2)}
    message = "Custom Diffusion is a kind of update that cannot be loaded"
    refused(models, write(tmp_path / "a.safetensors", custom), message)
    refused(models, write(tmp_path / "b.safetensors", {}), "unknown content; nothing of it can be attached")
    checkpoint = {
        key: torch.ones(1) for key in ("down_blocks.0.a", "up_blocks.0.a", "mid_block.a", "time_embedding.linear_1.a")
    }
    refused(models, write(tmp_path / "c.safetensors", checkpoint), "is no LoRA but UNet, with the names of diffusers")


def test_two_updates_of_one_layer(models: Models, tensors: Tensors, tmp_path: Path) -> None:
    dotted = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight"
    tensors[dotted] = tensors[f"{FIRST}.lora_down.weight"].clone()
    refused(
        models, write(tmp_path / "a.safetensors", tensors), "a.safetensors: .* are both the down of unet.MiddleBlock"
    )


@pytest.mark.parametrize(
    "foreign",
    [
        {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 1280)},
        {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 2048)},
        {"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.lora_A.weight": (4, 2048)},
    ],
)
def test_a_lora_of_another_family_is_told_in_words(
    models: Models, tmp_path: Path, foreign: dict[str, tuple[int, ...]]
) -> None:
    path = write(tmp_path / "a.safetensors", {key: torch.zeros(shape) for key, shape in foreign.items()})
    message = "is LoRA of Stable Diffusion XL.*but this model reads text 32 wide"
    refused(models, path, message)
    refused(models, path, message, strict=False)


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


def test_files_that_are_no_weights(models: Models, tensors: Tensors, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.safetensors", tensors).read_bytes()
    files = {"cut": whole[:-100], "short": whole[:50], "text": b"hello, this is no LoRA", "none": b""}
    files["pickle"] = pickle.dumps({"a": Code()})
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        refused(models, tmp_path / name, f"{name}: ")
    torch.save({"a": Code()}, tmp_path / "code.bin")
    refused(models, tmp_path / "code.bin", "wants to run code")
    refused(models, tmp_path / "absent.safetensors", "no such file", FileNotFoundError)
    (tmp_path / "folder").mkdir()
    refused(models, tmp_path / "folder", "neither adapter_config.json, nor", FileNotFoundError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "the whole should map names to values"),
        ('{"lora_alpha": "4"}', "lora_alpha should be a finite number, but it is '4'"),
        ('{"lora_alpha": NaN}', "lora_alpha should be a finite number"),
        (f'{{"lora_alpha": 1{"0" * 400}}}', "lora_alpha should be a finite number"),
        ('{"lora_alpha": 1, "use_rslora": "false"}', "use_rslora should be true or false, but it is 'false'"),
        ('{"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 3}}', "expressions of a file are not run"),
        ('{"lora_alpha": 1, "alpha_pattern": [3]}', "alpha_pattern should map names"),
        ('{"peft_type": "LOHA", "alpha": []}', "alpha should be a finite number"),
        ('{"peft_type": "LOKR", "rank_pattern": {"(a+)+$": 3}}', "rank_pattern has the regular expression"),
        ('{"peft_type": "OFT", "num_cayley_neumann_terms": 1e9}', "should be from 1 to 100, but it is 1e"),
        ('{"lora_alpha": 1, "init_lora_weights": "pissa"}', "'pissa', which changes the base model too"),
        ('{"lora_alpha": 1, "init_lora_weights": "lora_ga"}', "'lora_ga', which changes the base model too"),
        ('{"lora_alpha": 1, "alora_invocation_tokens": [1, 2]}', "this is an activated LoRA"),
        ('{"peft_type": "OFT", "coft": true, "eps": null}', "eps should be a finite number, but it is None"),
    ],
)
def test_settings_that_cannot_be(models: Models, tensors: Tensors, tmp_path: Path, text: str, message: str) -> None:
    refused(models, write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": text}), message)
    (tmp_path / "adapter_config.json").write_text(text)
    write(tmp_path / "adapter_model.safetensors", tensors)
    refused(models, tmp_path, message)


def test_a_model_that_is_none_of_ours(models: Models, tensors: Tensors, tmp_path: Path) -> None:
    weights = LoraWeights(write(tmp_path / "a.safetensors", tensors))
    with pytest.raises(TypeError, match="with a UNet as `unet`, but this UNet has none: pass the whole"):
        weights.patch(models[0].unet)  # pyright: ignore[reportArgumentType]


def test_a_failure_on_the_way_takes_everything_back(
    models: Models,
    tensors: Tensors,
    tmp_path: Path,
    before: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, inject, calls = LoraWeights(write(tmp_path / "a.safetensors", tensors)), LoraAdapter.inject, []

    def failing(self: LoraAdapter, parent: Any = None) -> LoraAdapter:
        calls.append(self)
        if len(calls) == 5:
            raise MemoryError("no more")
        return inject(self, parent)

    monkeypatch.setattr(LoraAdapter, "inject", failing)
    with pytest.raises(MemoryError):
        weights.patch(models[0])
    assert_unchanged(models[0], before)
    monkeypatch.undo()
    assert len(weights.patch(models[0]).attached) == 8
    weights.eject()


# -- mutations


@pytest.mark.slow
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_changed_names_are_an_error_or_change_nothing_of_what_is_attached(
    models: Models, tensors: Tensors, tmp_path: Path, before: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    key = data.draw(st.sampled_from(sorted(tensors)))
    at = data.draw(st.integers(0, len(key) - 1))
    letter = data.draw(st.sampled_from(["", "_", ".", "0", "1", "x", key[at] * 2]))
    changed = key[:at] + letter + key[at + 1 :]
    path = write(
        tmp_path / "a.safetensors", {changed if name == key else name: value for name, value in tensors.items()}
    )
    weights = LoraWeights(path)
    try:
        report = weights.patch(models[0])
    except ValueError as error:
        assert str(path) in str(error)
        assert_unchanged(models[0], before)
    else:
        # the new name is of another layer or spells the same one, and the file is still whole
        assert not report.left_out and len(report.attached) == len(tensors) // 3
        weights.eject()


def test_inspect_says_what_a_file_is_and_would_do(models: Models, tensors: Tensors, tmp_path: Path) -> None:
    change(**{"lora_up.weight": lambda x: x[:5].clone()})(tensors)
    tensors["lora_unet_nothing.lora_down.weight"] = torch.ones(2, 2)
    path = write(tmp_path / "a.safetensors", tensors)
    inspection = inspect_lora(path, models[0])
    assert str(inspection.identity) == "LoRA, with the names of kohya (it reads text 32 wide)"
    assert inspection.ranks == {3: 8, 2: 1} and min(inspection.alphas) == 0.5
    assert inspection.report is not None and len(inspection.report.attached) == 7
    assert [left.key for left in inspection.report.left_out] == ["lora_unet_nothing.lora_down.weight", FIRST]
    text = str(inspection)
    assert "LoRA on 9 layers" in text and "do not fit the linear" in text and "7 layers of unet" in text
    assert json.dumps(dict(inspection.ranks))
    with pytest.raises(FileNotFoundError):
        inspect_lora(tmp_path / "absent")
