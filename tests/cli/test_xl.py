"""Commands on Stable Diffusion XL: pictures, files of every form, and LoRAs."""

from pathlib import Path

import pytest
import torch
from cli_specimens import FAST, fail, only_picture, pixels, succeed
from diffusion_specimens import SPECS, small_folder
from torch import nn

from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.latent_diffusion import StableDiffusion_XL
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
