"""Files of every kind of update of peft and diffusers: our models compute what theirs do, and theirs what ours do."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from lora_specimens import Models, assert_changed, assert_same, load_both, outputs, their_outputs, write
from peer_files import ALL, PEFT, WHOLE, assert_computes_the_same, peft_folder, peft_outputs, randomise
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    HRAConfig,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)

from refiners.foundationals.latent_diffusion.lora import (
    LoraWeights,
    compare_loras,
    convert_lora,
    inspect_lora,
    save_lora,
)
from refiners.weights.files import read_safetensors, write_safetensors
from refiners.weights.lora_keys import Kind

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # peft's own warnings


@pytest.mark.parametrize("kind", PEFT)
def test_peft_computes_the_same_and_our_files_do_too(models: Models, tmp_path: Path, kind: str) -> None:
    source = peft_folder(models[1], tmp_path / "a", kind)
    assert_computes_the_same(models, source)
    save_lora(tmp_path / "b.safetensors", models[0])
    fresh, _ = load_both()
    LoraWeights(tmp_path / "b.safetensors").patch(fresh)
    assert_same(outputs(fresh), outputs(models[0]))
    comparison = compare_loras(source, tmp_path / "b.safetensors", load_both()[0])
    assert comparison.equal_count == len(comparison.layers)


def test_what_is_off_in_a_glora_is_zero_or_refused(models: Models, tmp_path: Path) -> None:
    source = peft_folder(models[1], tmp_path / "a", "GLoRA of numbers") / "unet"
    tensors = read_safetensors(source / "adapter_model.safetensors")
    assert "alphas:" not in str(inspect_lora(source)) and "elementwise GLoRA on" in str(inspect_lora(source))
    zeros = [key for key in tensors if key.endswith("glora_C.zeros")]
    assert len(LoraWeights(source).patch(models[0]).attached) == len(zeros) > 0
    write_safetensors(source / "adapter_model.safetensors", tensors | {zeros[0]: tensors[zeros[0]] + 1})
    with pytest.raises(ValueError, match=rf"{re.escape(zeros[0])}' should hold zeros, as what it stands for is off"):
        LoraWeights(source).patch(load_both()[0])


def test_gloras_of_several_forms_are_no_adapter_of_peft(models: Models, tmp_path: Path) -> None:
    source = peft_folder(models[1], tmp_path / "a", "GLoRA") / "unet"
    tensors = read_safetensors(source / "adapter_model.safetensors")
    first = next(key for key in tensors if key.endswith("glora_A.Xd"))
    up = first.removesuffix("Xd") + "Xu"
    cases = {
        "A or B in another form than others: constant, lora": {first.removesuffix("Xd") + "X": torch.ones(1)},
        "ranks that peft cannot mix: 2, 3": {first: tensors[first][:, :2], up: tensors[up][:2]},
    }
    for reason, changed in cases.items():
        kept = {key: tensor for key, tensor in tensors.items() if key not in (first, up)}
        write_safetensors(tmp_path / "b.safetensors", kept | changed)
        with pytest.raises(ValueError, match=reason):
            convert_lora(tmp_path / "b.safetensors", tmp_path / "c", models[0], "peft")
        convert_lora(tmp_path / "b.safetensors", tmp_path / "c.safetensors", models[0], "kohya")


@pytest.mark.parametrize("kind", WHOLE)
def test_biases_and_whole_layers_of_peft_compute_the_same(models: Models, tmp_path: Path, kind: str) -> None:
    source = peft_folder(models[1], tmp_path / "a", kind)
    kinds = assert_computes_the_same(models, source)
    bias = Kind.DIFFERENCE if kind == "LoRA with biases" else Kind.WHOLE
    assert kinds == ({bias} if kind == "norms" else {Kind.LORA, bias})
    save_lora(tmp_path / "b.safetensors", models[0])
    fresh, _ = load_both()
    before = outputs(fresh)
    weights = LoraWeights(tmp_path / "b.safetensors")
    weights.patch(fresh)
    assert_same(outputs(fresh), outputs(models[0]))
    weights.eject()
    assert all(torch.equal(*pair) for pair in zip(outputs(fresh), before, strict=True))
    if Kind.WHOLE in kinds:
        with pytest.raises(ValueError, match="has a whole weight or bias, and files hold differences"):
            convert_lora(source, tmp_path / "c.safetensors", fresh)


def test_ranks_that_adalora_took_away_are_gone(models: Models, tmp_path: Path) -> None:
    _, theirs = models
    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=5, lora_alpha=7, total_step=9, target_modules=["to_q", "conv1"])
    adapted: Any = get_peft_model(theirs.unet, config)
    randomise(parameter for parameter in adapted.parameters() if parameter.requires_grad)
    values = {name: value for name, value in adapted.base_model.model.named_parameters() if "lora_E" in name}
    kept = {name: [(index + line) % 3 > 1 for line in range(5)] for index, name in enumerate(values)}
    kept[next(iter(kept))] = [False] * 5
    with torch.no_grad():
        for name, value in values.items():
            value[[not each for each in kept[name]]] = 0
    config.rank_pattern = kept
    adapted.eval().save_pretrained(tmp_path / "unet")
    ours, before, expected = models[0], outputs(models[0]), their_outputs(theirs)
    report = LoraWeights(tmp_path).patch(ours)
    assert_changed(before, expected, "unet")
    assert_same(outputs(ours), expected)
    assert {update.rank for update in report.attached} <= {1, 2} and len(report.attached) == len(kept) - 1


def test_the_weights_of_a_peft_folder_stand_for_all_of_it(models: Models, tmp_path: Path) -> None:
    source = peft_folder(models[1], tmp_path / "a", "LoRA")
    for path in (source / "unet", source / "unet/adapter_model.safetensors"):
        weights = LoraWeights(path)
        assert {update.alpha for update in weights.patch(models[0]).attached} == {5}
        weights.eject()


STRANGE: dict[str, tuple[Any, str]] = {
    "FOURIERFT": (FourierFTConfig(n_frequency=20, target_modules=["to_q"]), "and peft's FOURIERFT cannot be loaded"),
    "HRA": (HRAConfig(r=4, target_modules=["to_q"]), "and peft's HRA cannot be loaded"),
    "VERA": (VeraConfig(r=4, target_modules=["to_q"]), "VeRA is a kind of update that cannot be loaded"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_an_adapter_of_peft_that_is_of_no_known_kind_is_called_by_its_type(
    models: Models, tmp_path: Path, kind: str
) -> None:
    ours, theirs = models
    config, reason = STRANGE[kind]
    get_peft_model(theirs.unet, config).save_pretrained(tmp_path / "a")
    message = f"a is an adapter of peft's {kind}, a kind that cannot be loaded: merge it into its model with peft, and"
    for strict in (True, False):
        with pytest.raises(ValueError, match=message):
            LoraWeights(tmp_path / "a").patch(ours, strict=strict)
    text = str(inspect_lora(tmp_path / "a", ours))
    assert f"  peft's {kind}, which cannot be loaded" in text and reason in text


@pytest.mark.parametrize("is_old", [True, False])
def test_biases_that_peft_has_trained_are_read_or_missed(models: Models, tmp_path: Path, is_old: bool) -> None:
    ours, theirs = models
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, bias="lora_only", target_modules=["to_q", "to_out.0"])
    adapted: Any = get_peft_model(theirs.unet, config)
    randomise(parameter for parameter in adapted.parameters() if parameter.requires_grad)
    adapted.eval().save_pretrained(tmp_path)
    biases = {key: bias for key, bias in adapted.state_dict().items() if key.endswith("to_out.0.base_layer.bias")}
    if is_old:  # when its layers were those of the base themselves, peft saved these as well
        tensors = read_safetensors(tmp_path / "adapter_model.safetensors")
        tensors |= {key.replace("base_layer.", ""): bias for key, bias in biases.items()}
        write(tmp_path / "adapter_model.safetensors", tensors)
        assert not LoraWeights(tmp_path).patch(ours).left_out
    else:
        message = rf"{len(biases)} of .*, the first is .*\.to_out\.0\.bias': it was trained, as the settings say, but"
        with pytest.raises(ValueError, match=message):
            LoraWeights(tmp_path).patch(ours)
        assert len(LoraWeights(tmp_path).patch(ours, strict=False).left_out) == len(biases)
        _, theirs = load_both()
        PeftModel.from_pretrained(theirs.unet, str(tmp_path))
    assert_same(outputs(ours), their_outputs(theirs))


def test_a_whole_model_is_no_adapter(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    path = write(tmp_path / "unet.safetensors", theirs.unet.state_dict())
    with pytest.raises(ValueError, match="is no LoRA but UNet"):
        LoraWeights(path).patch(ours, strict=False)


@pytest.mark.parametrize("kind", PEFT)
def test_peft_computes_the_same_from_the_folders_that_we_write(models: Models, tmp_path: Path, kind: str) -> None:
    source = peft_folder(models[1], tmp_path / "a", kind)
    expected = their_outputs(models[1])
    LoraWeights(source).patch(models[0])
    save_lora(tmp_path / "b", models[0], format="peft")
    assert_same(peft_outputs(tmp_path / "b"), expected)


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_dora_is_written_as_peft_has_it(models: Models, tmp_path: Path, form: str) -> None:
    peft_folder(models[1], tmp_path / "a", "DoRA")
    assert_computes_the_same(models, tmp_path / "a")
    save_lora(tmp_path / "b", models[0], format=form)
    ours = read_safetensors(tmp_path / "b/unet/adapter_model.safetensors" if form == "peft" else tmp_path / "b")
    theirs = read_safetensors(tmp_path / "a/unet/adapter_model.safetensors")
    for key, tensor in theirs.items():
        name = key if form == "peft" else f"unet.{key.removeprefix('base_model.model.')}"
        assert torch.equal(ours[name], tensor), key


@pytest.mark.parametrize("use_dora", [True, False])
def test_files_of_diffusers(models: Models, tmp_path: Path, use_dora: bool) -> None:
    _, theirs = models
    torch.manual_seed(0)
    layers: dict[str, Any] = {}
    for component, names in ALL.items():
        model = getattr(theirs, component)
        config = LoraConfig(r=3, lora_alpha=5, use_dora=use_dora, target_modules=names)
        model.add_adapter(config)
        randomise(parameter for name, parameter in model.named_parameters() if "lora_" in name)
        layers[f"{component}_lora_layers"] = get_peft_model_state_dict(model)
        layers[f"{component}_lora_adapter_metadata"] = config.to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers)
    assert assert_computes_the_same(models, tmp_path) == {Kind.DORA if use_dora else Kind.LORA}
