"""`refiners inspect`: what it says of models and files, and that it reads no weights."""

from pathlib import Path

import pytest
import torch
from cli_specimens import fail, succeed
from diffusion_specimens import SMALL

import refiners.fluxion.layers as fl
from refiners.adapters.lora import LoraAdapter
from refiners.cli.reports import pruned_tree
from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.lora import save_lora
from refiners.weights import header
from refiners.weights.files import write_safetensors


def test_a_model_shows_its_parts_and_trees(folder: Path) -> None:
    lines = succeed("inspect", folder).splitlines()
    assert lines[0] == f"{folder}: pictures of 64x64"
    assert [line.split() for line in lines[1:6]] == [
        ["part", "parameters", "in", "float32", "in", "float16"],
        ["clip_text_encoder", "1.6M", "6.11", "MiB", "3.05", "MiB"],
        ["unet", "1.11M", "4.22", "MiB", "2.11", "MiB"],
        ["lda", "261k", "0.996", "MiB", "510", "KiB"],
        ["all", "2.97M", "11.3", "MiB", "5.66", "MiB"],
    ]
    assert "vae/diffusion_pytorch_model.safetensors: 180 tensors, 261k parameters, 0.996 MiB, float32" in lines
    assert "unet: UNet(), 1.11M parameters, float32" in lines
    assert "├── DownBlocks(), 251k parameters" in lines
    assert not any(line.startswith("│") for line in lines)


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 100])
def test_depth_cuts_the_tree_where_it_says(folder: Path, depth: int) -> None:
    unet = StableDiffusion_1(device="meta", spec=SMALL).unet
    lines = pruned_tree(unet, depth).splitlines()
    whole = repr(unet).splitlines()
    assert set(lines) <= set(whole) and lines[0] == whole[0]
    deepest = max(((len(line) - len(line.lstrip("│ ├└─"))) // 4 for line in lines), default=0)
    assert deepest == min(depth, 9) if depth < 100 else lines == whole
    assert pruned_tree(unet, depth) in succeed("inspect", folder, "--depth", depth)


@pytest.mark.slow
def test_a_whole_model_in_one_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StableDiffusion_1, "default_spec", SMALL)
    path = tmp_path / "model.safetensors"
    succeed("convert", folder, "--to", "single-file", path)
    output = succeed("inspect", path)
    assert output.startswith(f"{path}: whole model of Stable Diffusion 1, with the names of the original files")
    assert "first_stage_model  180 tensors, 261k parameters" in output
    assert "fits all of Stable Diffusion 1: 520 tensors have a place" in output
    assert "unet: UNet()" in output


@pytest.mark.slow
@pytest.mark.parametrize("form", ["diffusers", "parts"])
def test_parts_are_held_against_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(StableDiffusion_1, "default_spec", SMALL)
    monkeypatch.chdir(tmp_path)
    succeed("convert", folder, "--to", form, "model")
    files = sorted(Path("model").rglob("*.safetensors"))
    reports = [succeed("inspect", path) for path in files]
    for part, count in (("unet", 304), ("lda", 180), ("clip_text_encoder", 36)):
        found = [text for text in reports if f"fits {part} of Stable Diffusion 1: {count} tensors" in text]
        assert len(found) == 1, reports


def test_a_part_of_other_sizes_does_not_fit(folder: Path) -> None:
    output = succeed("inspect", folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert "does not fit unet of Stable Diffusion 1: " in output and "have another shape" in output


def test_a_lora_says_what_would_attach(folder: Path, lora: Path) -> None:
    output = succeed("inspect", lora, "--model", folder)
    assert f"{lora}: LoRA, with the names of kohya" in output
    assert "ranks: 2 on " in output and "layers of unet; LoRA of rank 2" in output
    other = succeed("inspect", lora)
    assert "'style': nothing attached" in other and other.count("do not fit the linear") == 74


def test_a_lora_of_the_embedded_model_is_held_against_that(tmp_path: Path) -> None:
    builtin = StableDiffusion_1.from_pretrained("builtin")
    for layer, parent in list(builtin.unet.walk(fl.Linear))[:3]:
        LoraAdapter(layer, rank=2).inject(parent)
    save_lora(tmp_path / "small.safetensors", builtin, "lora")
    assert "as 'small': 3 layers of unet" in succeed("inspect", tmp_path / "small.safetensors")


def test_the_header_of_a_lora_is_parsed_once(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[object] = []
    parse = header._parse
    monkeypatch.setattr(header, "_parse", lambda path, text: parsed.append(path) or parse(path, text))
    succeed("inspect", lora)
    assert parsed == [lora]


def test_a_torch_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "thing.bin"
    torch.save({"a.weight": torch.zeros(3, 4), "b.weight": torch.zeros(5, dtype=torch.float16)}, path)
    output = succeed("inspect", path)
    assert f"{path}: a file of unknown content" in output
    assert "2 tensors, 17 parameters, 58 B, float16 and float32" in output
    assert "what it would fit is not known" in output


def test_metadata_is_shown_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "thing.safetensors"
    write_safetensors(path, {"x": torch.zeros(2)}, {"author": "[red]me[/red]", "long": "y" * 1000})
    output = succeed("inspect", path)
    assert "author: [red]me[/red]" in output
    assert f"long: {'y' * 160}…" in output


def test_what_cannot_be_read_ends_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    path.write_text("no weights at all")
    assert f"{path}: " in fail("inspect", path)
    assert "is no folder, no file" in fail("inspect", tmp_path / "none")
    assert "there is no unet/config.json" in fail("inspect", tmp_path)
