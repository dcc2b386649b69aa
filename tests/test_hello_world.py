"""The first program of the project's founding document, as it was printed there, at the real size with random weights.

What differs: the device, the number of steps, and that the files are made here.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from refiners.foundationals.latent_diffusion import SD1, StableDiffusion_1
from refiners.foundationals.latent_diffusion.unet_names import diffusers_names

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    ["convert-clip-weights.py", "--output-file", "CLIPTextEncoderL.safetensors"],
    ["convert-sd-lda-weights.py", "--output-file", "lda.safetensors"],
    ["convert-sd-unet-weights.py", "--output-file", "unet.safetensors"],
]
PROGRAM = """
from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.lora import LoraWeights
from refiners.fluxion.utils import load_from_safetensors, manual_seed
import torch


sd15 = StableDiffusion_1(device="cpu")
sd15.clip_text_encoder.load_state_dict(load_from_safetensors("CLIPTextEncoderL.safetensors"))
sd15.lda.load_state_dict(load_from_safetensors("lda.safetensors"))
sd15.unet.load_state_dict(load_from_safetensors("unet.safetensors"))

# This uses the LoraAdapter internally and takes care to inject it where it should
lora_weights = LoraWeights("pokemon_lora.safetensors", device=sd15.device)
lora_weights.patch(sd15, scale=1.0)

prompt = "a cute cat"

with torch.no_grad():
    clip_text_embedding = sd15.compute_text_embedding(prompt)

sd15.set_num_inference_steps(2)

manual_seed(2)
x = torch.randn(1, 4, 64, 64, device=sd15.device)

with torch.no_grad():
    for step in sd15.steps:
        x = sd15(
            x,
            step=step,
            clip_text_embedding=clip_text_embedding,
            condition_scale=7.5,
        )
    predicted_image = sd15.lda.decode_latents(x)
    predicted_image.save("pokemon_cat.png")
"""


def write_model(folder: Path) -> None:
    """A folder in the layout of stable-diffusion-v1-5; weights of a size that keeps activations in range."""
    model = StableDiffusion_1(device="meta")
    pool = torch.randn(2**22 + 1, generator=torch.Generator().manual_seed(0))  # one for all, as a billion take long
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        noise = pool.repeat(tensor.numel() // len(pool) + 1)[: tensor.numel()].reshape(tensor.shape)
        is_matrix = tensor.ndim > 1
        size = 0.5 / tensor[0].numel() ** 0.5 if is_matrix else 0.1
        tensors[name] = noise.mul_(size) + (0.0 if is_matrix or name.endswith("bias") else 0.8)
    model.load_state_dict(tensors, assign=True)
    model.save_pretrained(folder)


def lora_in_the_old_format() -> dict[str, Tensor]:
    """Rank 4 on every projection of every attention of the UNet, under the names of diffusers' attention processors."""
    names = diffusers_names(SD1.unet)
    generator = torch.Generator().manual_seed(1)
    lora: dict[str, Tensor] = {}
    for name, weight in StableDiffusion_1(device="meta").unet.state_dict().items():
        layer, _, projection = str(names.to_theirs(name)).removesuffix(".weight").rpartition(".to_")
        if not layer or not name.endswith("weight"):
            continue
        key = f"{layer}.processor.to_{projection.removesuffix('.0')}_lora"
        lora[f"{key}.down.weight"] = torch.randn(4, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        lora[f"{key}.up.weight"] = torch.randn(weight.shape[0], 4, generator=generator) * 0.2
    return lora


def run(*arguments: str, cwd: Path) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def diffusers_picture(folder: Path, lora: dict[str, Tensor]) -> Any:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    layers = dict(pipeline.unet.named_modules())
    with torch.no_grad():
        for key in [key.removesuffix(".down.weight") for key in lora if key.endswith(".down.weight")]:
            layer = key.replace(".processor.", ".").removesuffix("_lora")
            layer = f"{layer}.0" if layer.endswith("to_out") else layer
            layers[layer].weight += lora[f"{key}.up.weight"] @ lora[f"{key}.down.weight"]
    torch.manual_seed(2)
    latents = torch.randn(1, 4, 64, 64)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a cute cat", num_inference_steps=2, guidance_scale=7.5, latents=latents, output_type="np").images[
        0
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_first_program_draws_what_diffusers_draws(tmp_path: Path) -> None:
    write_model(tmp_path / "stable-diffusion-v1-5")
    lora = lora_in_the_old_format()
    torch.save(lora, tmp_path / "pytorch_lora_weights.bin")
    for script, *options in SCRIPTS:
        run(str(ROOT / "scripts" / script), "--from", "stable-diffusion-v1-5", *options, cwd=tmp_path)
    files = ("--from", "pytorch_lora_weights.bin", "--output-file", "pokemon_lora.safetensors")
    run(str(ROOT / "scripts" / "convert-lora-weights.py"), *files, cwd=tmp_path)
    run("-c", PROGRAM, cwd=tmp_path)
    theirs = diffusers_picture(tmp_path / "stable-diffusion-v1-5", lora)
    ours = np.asarray(Image.open(tmp_path / "pokemon_cat.png"), dtype=np.float64) / 255
    assert ours.shape == (512, 512, 3)
    assert theirs.std() > 0.02
    error = np.square(ours - (theirs * 255).round() / 255).mean()
    assert 10 * np.log10(1 / error) > 50
