"""LoRAs written to files: peers compute the same from them, and reading them again gives the same bits."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_specimens import (
    Models,
    assert_changed,
    assert_same,
    kohya_tensors,
    load_both,
    merge,
    outputs,
    random_factors,
    their_outputs,
    write,
)
from peft import PeftModel
from torch import nn

import refiners.fluxion.layers as fl
from refiners.adapters.lora import Conv2dLora, LoraAdapter
from refiners.foundationals.latent_diffusion.lora import (
    LoraWeights,
    compare_loras,
    convert_lora,
    export_lora,
    save_lora,
)
from refiners.weights.files import read_safetensors

FORMATS = ["kohya", "diffusers", "peft"]


def patched(models: Models, tmp_path: Path, **options: Any) -> LoraWeights:
    """Our model with a LoRA on all layers that all peers can adapt."""
    ours, theirs = models
    factors = random_factors(theirs, lambda component, name: component == "unet" or "layers" in name, **options)
    weights = LoraWeights(write(tmp_path / "source.safetensors", kohya_tensors(factors)))
    weights.patch(ours)
    return weights


def train_made(sd15: Any) -> None:
    """LoRAs as a training makes them: new ones on chosen layers, whose weights then change."""
    torch.manual_seed(2)
    for tree in (sd15.unet, sd15.clip_text_encoder):
        for block in tree.layers(fl.Attention):
            for linear, parent in list(block.walk(nn.Linear)):
                adapter = LoraAdapter(linear, rank=3, alpha=2.0).inject(parent)
                nn.init.normal_(adapter.loras["lora"].up.weight, std=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("is_trained", [True, False])
def test_export_and_load_give_the_same_bits(models: Models, tmp_path: Path, form: str, is_trained: bool) -> None:
    ours, _ = models
    if is_trained:
        train_made(ours)
    else:
        patched(models, tmp_path)
    save_lora(tmp_path / "first", ours, format=form)
    fresh, _ = load_both()
    LoraWeights(tmp_path / "first", name="again").patch(fresh)
    # not to the bit: where in a file tensors begin decides how they are aligned, and so how matrix products sum up
    assert_same(outputs(fresh), outputs(ours))
    (first, settings), (second, others) = export_lora(ours, format=form), export_lora(fresh, format=form)
    assert settings == others and first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_diffusers_computes_the_same_from_our_files(models: Models, tmp_path: Path, form: str) -> None:
    ours, theirs = models
    before = outputs(ours)
    # from kohya's files, diffusers takes the alpha of one layer for that of all
    patched(models, tmp_path, **({"rank": 2, "alpha": 1.5} if form == "kohya" else {}))
    save_lora(tmp_path / "out.safetensors", ours, "source", form)
    theirs.load_lora_weights(tmp_path / "out.safetensors")
    expected = their_outputs(theirs)
    assert_changed(before, expected)
    assert_same(outputs(ours), expected)


@pytest.mark.slow
def test_peft_computes_the_same_from_our_folders(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    before = outputs(ours)
    patched(models, tmp_path)
    save_lora(tmp_path / "out", ours, format="peft")
    for name in ("unet", "text_encoder"):
        PeftModel.from_pretrained(getattr(theirs, name), str(tmp_path / "out" / name))
    expected = their_outputs(theirs)
    assert_changed(before, expected)
    assert_same(outputs(ours), expected)


def test_kohya_files_name_everything_that_web_uis_read(models: Models, tmp_path: Path) -> None:
    patched(models, tmp_path, rank=4, alpha=2.0)
    tensors, metadata = export_lora(models[0])
    source = read_safetensors(tmp_path / "source.safetensors")
    assert tensors.keys() == source.keys()
    assert all(torch.equal(tensor, source[key]) for key, tensor in tensors.items())
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2")


def test_one_of_several_is_written_in_the_format_asked_for(models: Models, tmp_path: Path) -> None:
    patched(models, tmp_path)
    train_made(models[0])
    tensors, _ = export_lora(models[0], "lora", dtype=torch.float16)
    assert {tensor.shape for key, tensor in tensors.items() if key.endswith("alpha")} == {torch.Size([])}
    factors = [tensor for key, tensor in tensors.items() if not key.endswith("alpha")]
    assert {tensor.dtype for tensor in factors} == {torch.float16}
    assert len(factors) == 2 * sum(lora.name == "lora" for lora in _loras(models[0]))


def _loras(sd15: Any) -> list[Any]:
    trees = (sd15.unet, sd15.clip_text_encoder)
    return [
        lora for tree in trees for adapter in tree.layers(LoraAdapter, recurse=True) for lora in adapter.loras.values()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_convert_keeps_every_bit(models: Models, tmp_path: Path, form: str) -> None:
    ours, _ = models
    patched(models, tmp_path).eject()
    count = convert_lora(tmp_path / "source.safetensors", tmp_path / "there", ours, form)
    assert convert_lora(tmp_path / "there", tmp_path / "back.safetensors", ours) == count
    source, back = read_safetensors(tmp_path / "source.safetensors"), read_safetensors(tmp_path / "back.safetensors")
    assert source.keys() == back.keys() and len(source) == 3 * count
    assert all(torch.equal(tensor, back[key]) for key, tensor in source.items())


@pytest.mark.slow
def test_what_no_file_can_hold_is_refused(models: Models, tmp_path: Path) -> None:
    ours, _ = models
    with pytest.raises(ValueError, match="there is none at all"):
        export_lora(ours)
    patched(models, tmp_path)
    with pytest.raises(ValueError, match="no LoRA 'other' on this model; there are: source"):
        export_lora(ours, "other")
    with pytest.raises(ValueError, match="no LoRA format 'onnx' to write; there are: kohya, diffusers, peft"):
        save_lora(tmp_path / "x", ours, format="onnx")
    train_made(ours)
    with pytest.raises(ValueError, match="say the name of a LoRA; there are: lora, source"):
        export_lora(ours)
    train_made(ours)
    with pytest.raises(ValueError, match=r"two LoRAs 'lora' on unet\.DownBlocks"):
        export_lora(ours, "lora")
    convolution, parent = next(ours.unet.walk(nn.Conv2d))
    odd = Conv2dLora("odd", convolution.in_channels, convolution.out_channels, rank=2)
    LoraAdapter(convolution, odd).inject(parent)
    with pytest.raises(ValueError, match=r"kernels \(1, 1\) and \(3, 3\), but files hold only"):
        export_lora(ours, "odd")


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_a_mix_of_lora_and_dora_is_refused_where_an_adapter_is_all_the_one_or_the_other(
    models: Models, tmp_path: Path, form: str
) -> None:
    ours, theirs = models
    tensors = kohya_tensors(random_factors(theirs, lambda component, name: name.endswith("attn1.to_q")))
    name = next(iter(tensors)).partition(".")[0]
    tensors[f"{name}.dora_scale"] = torch.ones(len(tensors[f"{name}.lora_up.weight"]), 1)
    source = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=r"is no DoRA, that of unet\..* is one, and peft has all or none: peft cannot"):
        convert_lora(source, tmp_path / "b", ours, form)
    assert not (tmp_path / "b").exists()


def test_values_out_of_range_of_half_precision_are_refused(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    factors = random_factors(theirs, lambda component, name: name == "conv_in")
    factors[0].up[0] = 1e6
    source = write(tmp_path / "a.safetensors", kohya_tensors(factors))
    with pytest.raises(
        ValueError, match=r"in torch.float16 the up of 'lora_unet_conv_in' has values that are NaN or inf"
    ):
        convert_lora(source, tmp_path / "b.safetensors", ours, dtype=torch.float16)
    assert not (tmp_path / "b.safetensors").exists()


def test_settings_of_folders_are_those_of_peft(models: Models, tmp_path: Path) -> None:
    patched(models, tmp_path, rank=4, alpha=2.0)
    save_lora(tmp_path / "out", models[0], format="peft")
    settings = json.loads((tmp_path / "out/unet/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (4, 2.0, {})


def test_one_tree_makes_one_folder(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    factors = random_factors(theirs, lambda component, name: "to_q" in name)
    LoraWeights(write(tmp_path / "a.safetensors", kohya_tensors(factors))).patch(ours)
    save_lora(tmp_path / "out", ours, format="peft")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    fresh, _ = load_both()
    LoraWeights(tmp_path / "out").patch(fresh)
    merge(theirs, factors)
    assert_same(outputs(fresh), their_outputs(theirs))


def test_a_folder_that_is_written_again_holds_nothing_from_before(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    files: list[Path] = []
    for index, name in enumerate(("to_q", "_proj")):  # of the UNet alone, and of both
        factors = random_factors(theirs, lambda component, full, name=name: name in full)
        files.append(write(tmp_path / f"{index}.safetensors", kohya_tensors(factors)))
    for file in (*files, *files):
        convert_lora(file, tmp_path / "out", ours, "peft")
        comparison = compare_loras(file, tmp_path / "out", ours)
        assert comparison.equal_count == len(comparison.layers) > 0


@pytest.mark.slow
@pytest.mark.parametrize("half", [True, False])
def test_the_script_converts_the_old_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config, half: bool
) -> None:
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
    source = {f"{layer}.down.weight": torch.randn(4, 1280), f"{layer}.up.weight": torch.randn(1280, 4)}
    torch.save(source, tmp_path / "pytorch_lora_weights.bin")
    script = pytestconfig.rootpath / "scripts/convert-lora-weights.py"
    output = tmp_path / "pokemon_lora.safetensors"
    arguments = ["--from", str(tmp_path / "pytorch_lora_weights.bin"), "--output-file", str(output)]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments, *(["--half"] if half else [])])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert not stopped.value.code
    written = read_safetensors(output)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    for ours, theirs in (("lora_down", "down"), ("lora_up", "up")):
        expected = source[f"{layer}.{theirs}.weight"]
        assert torch.equal(written[f"{name}.{ours}.weight"], expected.half() if half else expected)
    assert written[f"{name}.alpha"] == 4
