"""`refiners lora`: each command writes what the function of Python does, says what is lost, and refuses in one line."""

from pathlib import Path

import pytest
import torch
from cli_specimens import fail, python, succeed, write_lora
from safetensors.torch import load_file

from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.lora.loras import Loras


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_sum_has_the_ranks_of_all_and_weights_of_the_arguments(folder: Path, lora: Path) -> None:
    other = write_lora(Path("other.safetensors"), folder)
    output = succeed("lora", "combine", f"{lora}:0.5", other, "sum.safetensors", "--model", folder)
    assert output.startswith("wrote sum.safetensors: LoRA on ") and "rank 4; nothing was lost" in output
    stored, parts = load_file("sum.safetensors"), [load_file(lora), load_file(other)]
    key = next(key for key in stored if key.endswith("lora_up.weight"))
    down = key.replace("lora_up", "lora_down")
    expected = sum(scale * part[key] @ part[down] for scale, part in zip((0.5, 1.0), parts, strict=True))
    torch.testing.assert_close(stored[key] @ stored[down], expected)


@pytest.mark.slow
def test_a_smaller_rank_says_what_it_loses(folder: Path, lora: Path) -> None:
    options = ["--rank", "1", "--model", folder, "--half"]
    for command in ("resize", "to-lora"):
        output = succeed("lora", command, lora, "small.safetensors", *options)
        assert "rank 1; lost " in output and " % in all, the most at unet." in output
    stored = load_file("small.safetensors")
    assert {tensor.dtype for key, tensor in stored.items() if not key.endswith("alpha")} == {torch.float16}
    assert "rank" in succeed("lora", "combine", lora, "folder", "--to", "peft", *options)
    assert Path("folder/adapter_config.json").exists()


@pytest.mark.slow
def test_extraction_finds_the_lora_of_two_folders(folder: Path, lora: Path) -> None:
    tuned = StableDiffusion_1.from_pretrained(folder)
    loras = Loras(tuned, {})
    loras.add(lora)
    loras.merge()
    tuned.save_pretrained("tuned")
    output = succeed("lora", "extract", "tuned", folder, "found.safetensors", "--rank", "2")
    assert "LoRA on " in output and "rank 2" in output
    compared = succeed("lora", "combine", "found.safetensors", f"{lora}:-1", "rest.safetensors", "--model", folder)
    assert "rank 4" in compared


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resize", "LORA", "x.safetensors", "--model", "FOLDER"], "give a rank, an energy to keep, or both"),
        (
            ["resize", "LORA", "x.safetensors", "--energy", "2", "--model", "FOLDER"],
            "a share above 0 and up to 1, not 2",
        ),
        (["combine", "LORA:x", "x.safetensors", "--model", "FOLDER"], "should be a number"),
        (["combine", "none", "x.safetensors"], "none: there is no such file"),
        (["combine", "LORA", "x.safetensors", "--model", "LORA"], "this is no model"),
        (["extract", "FOLDER", "FOLDER", "x.safetensors", "--rank", "2"], "nothing to extract"),
        (["to-lora", "LORA", "x", "--rank", "2", "--to", "onnx", "--model", "FOLDER"], "no LoRA format 'onnx'"),
    ],
)
def test_what_cannot_be_ends_in_one_line(folder: Path, lora: Path, arguments: list[str], message: str) -> None:
    named = [each.replace("FOLDER", str(folder)).replace("LORA", str(lora)) for each in arguments]
    assert message in fail("lora", *named)
    assert not Path("x.safetensors").exists() and not Path("x").exists()


@pytest.mark.slow
def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys, refiners.cli.app; print('torch' in sys.modules)"
    assert python("-c", code, cwd=tmp_path).stdout.strip() == "False"
