"""`refiners convert` and the scripts: every form of a model into every other, LoRAs, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_specimens import ROOT, fail, python, succeed
from diffusion_specimens import SMALL, small_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from refiners.fluxion.utils import load_from_safetensors
from refiners.foundationals.latent_diffusion import StableDiffusion_1, StableDiffusion_1_Inpainting
from refiners.foundationals.latent_diffusion.lora import LoraWeights

FORMS = {"diffusers": "folder", "single-file": "model.safetensors", "parts": "parts"}
SCRIPTS = {
    "convert-clip-weights.py": ("clip_text_encoder", "CLIPTextEncoderL.safetensors"),
    "convert-sd-lda-weights.py": ("lda", "lda.safetensors"),
    "convert-sd-unet-weights.py": ("unet", "unet.safetensors"),
}


@pytest.fixture(autouse=True)
def small_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that do not tell their sizes are taken for the small model's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StableDiffusion_1, "default_spec", SMALL)


def tensors(where: Any) -> dict[str, Tensor]:
    return StableDiffusion_1.from_pretrained(where).state_dict()


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("target", FORMS)
def test_every_form_becomes_every_other(folder: Path, source: str, target: str) -> None:
    succeed("convert", folder, "--to", source, FORMS[source])
    output = succeed("convert", FORMS[source], "--to", target, f"again-{FORMS[target]}")
    assert output.splitlines() == [
        f"read {FORMS[source]}: 520 tensors, 2.97M parameters, 11.3 MiB, float32",
        f"wrote again-{FORMS[target]} ({target})",
    ]
    assert_same(tensors(folder), tensors(f"again-{FORMS[target]}"))


def test_there_and_back_gives_the_same_file(folder: Path) -> None:
    succeed("convert", folder, "--to", "single-file", "one.safetensors")
    succeed("convert", "one.safetensors", "--to", "parts", "parts")
    succeed("convert", "parts", "--to", "single-file", "two.safetensors")
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()


@pytest.mark.slow
def test_nine_channels_are_known_from_the_files(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "inpainting", StableDiffusion_1_Inpainting)
    succeed("convert", folder, "--to", "parts", "parts")
    succeed("convert", "parts", "--to", "single-file", "one.safetensors")
    assert_same(tensors(folder), tensors("one.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_half_writes_float16_and_it_stays(folder: Path, form: str) -> None:
    assert "float16" in succeed("convert", folder, "--to", form, FORMS[form], "--half")
    succeed("convert", FORMS[form], "--to", "parts", "kept")
    for part in ("unet", "lda", "clip_text_encoder"):
        expected = getattr(StableDiffusion_1.from_pretrained(folder), part).state_dict()
        name = "CLIPTextEncoderL" if part == "clip_text_encoder" else part
        assert_same(load_file(f"kept/{name}.safetensors"), {key: value.half() for key, value in expected.items()})


@pytest.mark.slow
@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_a_lora_becomes_other_forms(folder: Path, lora: Path, form: str) -> None:
    output = succeed("convert", lora, "--to", form, "other.safetensors", "--model", folder)
    assert f"wrote other.safetensors ({form}): " in output
    assert re.search(r"read it again: (\d+) of \1 layers are equal bit by bit", output)
    models = [StableDiffusion_1.from_pretrained(folder) for _ in range(2)]
    for model, path in zip(models, (lora, Path("other.safetensors")), strict=True):
        LoraWeights(path, name="style").patch(model)
    assert_same(models[0].state_dict(), models[1].state_dict())


def test_a_lora_in_half_and_as_a_folder(folder: Path, lora: Path) -> None:
    output = succeed("convert", lora, "--to", "peft", "adapter", "--half", "--model", folder)
    assert re.search(r"read it again: 0 of \d+ layers are equal bit by bit, .* up to \d\.\de-04 of the", output)
    stored = load_file("adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert "wrote back.safetensors" in succeed(
        "convert", "adapter", "--to", "kohya", "back.safetensors", "--model", folder
    )


def test_what_has_no_place_is_left_out_only_if_that_is_asked_for(folder: Path, lora: Path) -> None:
    stored = load_file(lora)
    save_file({**stored, "lora_unet_no_such_layer.alpha": torch.tensor(1.0)}, "more.safetensors")
    arguments = ("convert", "more.safetensors", "--to", "kohya", "fewer.safetensors", "--model", folder)
    assert "refiners convert IN OUT --to kohya --lenient" in fail(*arguments)
    assert not Path("fewer.safetensors").exists()
    output = succeed(*arguments, "--lenient")
    assert "left out 'lora_unet_no_such_layer.alpha': no layer of this model has this name" in output
    assert re.search(r"read it again: (\d+) of \1 layers are equal bit by bit", output)
    assert_same(load_file("fewer.safetensors"), stored)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "--to", "parts", "x"], "'none' is no folder"),
        (["FOLDER", "--to", "onnx", "x"], "no form of models called 'onnx'; choose from diffusers, single-file, parts"),
        (["FOLDER", "--to", "single-file", "x"], "give it a name that ends in .safetensors"),
        (["FOLDER", "--to", "parts", "x.safetensors"], "the form parts is a folder"),
        (["FOLDER", "--to", "parts", "x", "--model", "FOLDER"], "--model is for LoRAs"),
        (["FOLDER", "--to", "parts", "x", "--lenient"], "--lenient is for LoRAs"),
        (["LORA", "--to", "single-file", "x.safetensors", "--model", "FOLDER"], "no LoRA format 'single-file'"),
        (["LORA", "--to", "kohya", "no/x.safetensors", "--model", "FOLDER"], "the folder "),
        (["FOLDER/unet/diffusion_pytorch_model.safetensors", "--to", "parts", "x"], "no whole model, but UNet"),
        (["text.safetensors", "--to", "parts", "x"], "text.safetensors: "),
        (["broken", "--to", "parts", "x"], "lda.safetensors: there is no such file"),
    ],
)
def test_what_cannot_be_ends_in_one_line(folder: Path, lora: Path, arguments: list[str], message: str) -> None:
    Path("text.safetensors").write_text("no weights at all, only a text")
    Path("broken").mkdir()
    for name in ("unet", "CLIPTextEncoderL"):
        Path(f"broken/{name}.safetensors").touch()
    named = [each.replace("FOLDER", str(folder)).replace("LORA", str(lora)) for each in arguments]
    assert message in fail("convert", *named)
    assert not Path("x").exists() and not Path("x.safetensors").exists()


@pytest.mark.slow
def test_values_too_large_for_half_are_refused(folder: Path) -> None:
    model = StableDiffusion_1.from_pretrained(folder)
    with torch.no_grad():
        next(model.lda.parameters()).fill_(1e6)
    model.save_pretrained("large")
    message = fail("convert", "large", "--to", "single-file", "x.safetensors", "--half")
    assert "has values too large for torch.float16" in message and not Path("x.safetensors").exists()


def test_a_large_sum_of_small_values_is_fine() -> None:
    from refiners.foundationals.latent_diffusion.files.convert import check_range

    check_range({"x": torch.full((100,), 60000.0)}, torch.float16)


def run_script(name: str, *arguments: Any, cwd: Path) -> None:
    done = python(ROOT / "scripts" / name, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_write_what_parts_load(folder: Path, tmp_path: Path, script: str) -> None:
    part, default_name = SCRIPTS[script]
    run_script(script, "--from", folder, cwd=tmp_path)
    run_script(script, "--from", folder, "--output-file", "named.safetensors", "--half", cwd=tmp_path)
    sd15: Any = StableDiffusion_1(spec=SMALL)
    getattr(sd15, part).load_state_dict(load_from_safetensors(default_name))
    expected = getattr(StableDiffusion_1.from_pretrained(folder), part).state_dict()
    assert_same(getattr(sd15, part).state_dict(), expected)
    assert_same(load_file("named.safetensors"), {name: tensor.half() for name, tensor in expected.items()})


@pytest.mark.slow
def test_scripts_say_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    done = python(ROOT / "scripts" / "convert-sd-unet-weights.py", "--from", "nowhere", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: 'nowhere' is no folder")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_one_part_needs_no_other(folder: Path, tmp_path: Path) -> None:
    from refiners.foundationals.latent_diffusion.files.convert import convert_part

    copy = small_folder(tmp_path / "copy")
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert convert_part(copy, "unet", "unet.safetensors") == 304
    succeed("convert", folder, "--to", "single-file", "one.safetensors")
    assert convert_part("one.safetensors", "unet", "other.safetensors") == 304
    assert_same(load_file("unet.safetensors"), load_file("other.safetensors"))
