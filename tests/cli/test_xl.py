"""Commands on Stable Diffusion XL: pictures, files of every form, and LoRAs."""

import json
from pathlib import Path

import pytest
import torch
from cli_specimens import FAST, fail, only_picture, pixels, succeed
from diffusion_specimens import SPECS, small_folder
from PIL import Image
from torch import nn

from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.latent_diffusion import StableDiffusion_XL, StableDiffusion_XL_Refiner
from refiners.foundationals.latent_diffusion.lora import save_lora


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("cli") / "sdxl", StableDiffusion_XL)


def write_xl_lora(folder: Path, path: Path) -> Path:
    model = StableDiffusion_XL.from_pretrained(folder)
    torch.manual_seed(2)
    for tree in (model.unet, model.clip_text_encoder):
        for linear, parent in list(tree.walk(nn.Linear)):
            nn.init.normal_(LoraAdapter(linear, rank=2).inject(parent).loras["lora"].up.weight, std=0.5)
    save_lora(path, model)
    return path


def test_pictures_with_a_lora_in_another_form_are_the_same(
    xl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableDiffusion_XL, "default_spec", SPECS[StableDiffusion_XL])
    lora = write_xl_lora(xl_folder, tmp_path / "style.safetensors")
    succeed("convert", xl_folder, tmp_path / "xl.safetensors", "--to", "single-file")
    text = succeed("convert", lora, tmp_path / "other.safetensors", "--to", "diffusers")
    assert "of Stable Diffusion XL" in text and "are equal bit by bit" in text
    shown: dict[str, bytes] = {}
    for name, model, style in (
        ("plain", xl_folder, None),
        ("folder", xl_folder, lora),
        ("file", tmp_path / "xl.safetensors", tmp_path / "other.safetensors"),
    ):
        out = tmp_path / name
        options = ["--lora", style] if style else []
        succeed("generate", "a cat", "--seed", 3, "--model", model, *options, "--out", out, *FAST)
        shown[name] = pixels(only_picture(out))
    assert shown["folder"] == shown["file"] != shown["plain"]


def test_a_refiner_goes_on_and_is_in_the_picture(xl_folder: Path, tmp_path: Path) -> None:
    refiner = small_folder(tmp_path / "refiner", StableDiffusion_XL_Refiner)
    options = ["generate", "a cat", "--seed", 3, "--model", xl_folder, "--steps", 5, "--device", "cpu"]
    succeed(*options, "--refiner", f"{refiner}:0.6", "--out", tmp_path / "refined.png")
    succeed(*options, "--out", tmp_path / "plain.png")
    expected = StableDiffusion_XL.from_pretrained(xl_folder).generate(
        "a cat",
        seed=3,
        num_inference_steps=5,
        refiner=StableDiffusion_XL.from_pretrained(refiner),
        refiner_start=0.6,
        show_progress=False,
    )
    assert pixels(tmp_path / "refined.png") == expected[0].tobytes() != pixels(tmp_path / "plain.png")
    with Image.open(tmp_path / "refined.png") as image:
        assert json.loads(image.info["refiners"])["settings"]["refiner"] == f"{refiner}:0.6"
        assert "Refiner: refiner, Refiner switch at: 0.6" in image.info["parameters"]
    succeed("generate", "--like", tmp_path / "refined.png", "--out", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "refined.png").read_bytes()
    succeed("generate", "--like", tmp_path / "refined.png", "--refiner", "", "--out", tmp_path / "without.png")
    assert pixels(tmp_path / "without.png") == pixels(tmp_path / "plain.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--refiner", "REFINER:1"], "above 0 and below 1"),
        (["--refiner", "REFINER:nan"], "above 0 and below 1"),
        (["--refiner", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--refiner", "REFINER:0.0001"], "leaves none to the base"),
        (["--guidance", "nan"], "--guidance is nan"),
    ],
)
def test_a_refiner_that_cannot_be_ends_in_one_line(
    xl_folder: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    options = [option.replace("REFINER", str(xl_folder)) for option in options]
    line = fail("generate", "a cat", "--model", xl_folder, "--out", tmp_path / "a.png", *FAST, *options)
    assert message in line and not (tmp_path / "a.png").exists()


def test_what_it_is_made_of_is_shown(xl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StableDiffusion_XL, "default_spec", SPECS[StableDiffusion_XL])
    assert "DoubleTextEncoder" in succeed("inspect", xl_folder)
    succeed("convert", xl_folder, tmp_path / "xl.safetensors", "--to", "single-file")
    text = succeed("inspect", tmp_path / "xl.safetensors")
    assert "whole model of Stable Diffusion XL" in text and "fits all of Stable Diffusion XL" in text
    assert "text encoder" in succeed("inspect", xl_folder / "text_encoder_2/model.safetensors")
    lora = write_xl_lora(xl_folder, tmp_path / "style.safetensors")
    assert "nothing attached" not in succeed("inspect", lora, "--model", xl_folder)
    assert "is LoRA of Stable Diffusion XL" in fail("generate", "a cat", "--lora", lora, *FAST)
