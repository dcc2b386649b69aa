"""Running commands, and small files for them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from typer.testing import CliRunner, Result

from refiners.adapters.lora import LoraAdapter
from refiners.cli.app import app
from refiners.fluxion import layers as fl
from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.lora import save_lora

ROOT = Path(__file__).parent.parent.parent
FAST = ["--steps", "2", "--device", "cpu"]


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def succeed(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def fail(*arguments: Any) -> str:
    """The one line that a command ends with."""
    result = run(*arguments)
    assert result.exit_code == 1, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("error: ") and sum(line.startswith("error") for line in lines) == 1
    assert "Traceback" not in result.output
    return lines[-1]


def python(*arguments: Any, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def only_picture(folder: Path) -> Path:
    (path,) = folder.glob("*.png")
    return path


def write_lora(path: Path, folder: Path) -> Path:
    """A LoRA for the model of that folder, which makes a visible difference."""
    torch.manual_seed(5)
    model: Any = StableDiffusion_1.from_pretrained(folder)
    for linear, parent in list(model.unet.walk(fl.Linear)):
        LoraAdapter(target=linear, rank=2).inject(parent)
    for adapter, _ in model.unet.walk(LoraAdapter):
        for lora in adapter.loras.values():
            torch.nn.init.normal_(lora.up.weight, std=0.5)
    save_lora(path, model)
    return path
