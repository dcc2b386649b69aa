"""Stable Diffusion 1.5 at its full size against diffusers and transformers: steps, decoding, text, and loading.

Both sides hold the very same tensors, so that memory holds one model.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from bench.timing import Row, ratio_row
from refiners.foundationals.clip import CLIPTextEncoderL
from refiners.foundationals.clip.names import text_encoder_names
from refiners.foundationals.latent_diffusion import (
    SD1,
    SDXL,
    LatentDiffusionAutoencoder,
    StableDiffusion_1,
    UNet,
    autoencoder_names,
    unet_names,
)
from refiners.foundationals.latent_diffusion.files.diffusers_configs import write_spec
from refiners.weights.rules import Names

BOUND = 0.95
SIZES = (8, 16, 32, 64)
XL_SIZE = 32
ROUNDS = {8: 11, 16: 9, 32: 5, 64: 3}
LOAD_ROUNDS = 3
MEMORY_BOUND = 1.01


def share(theirs: Any, ours: nn.Module, names: Names) -> None:
    """Give both models the same random tensors, of a size that keeps activations in range."""
    tensors = {
        name: torch.randn(tensor.shape) * 0.7 / tensor[0].numel() ** 0.5
        if tensor.ndim > 1
        else torch.rand(tensor.shape)
        for name, tensor in theirs.state_dict().items()
    }
    theirs.load_state_dict(tensors, assign=True)
    ours.load_state_dict({str(names.to_ours(name)): tensor for name, tensor in tensors.items()}, assign=True)
    theirs.eval()


def compare(name: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], rounds: int) -> Row:
    with torch.no_grad():
        expected = theirs()
        error = (ours() - expected).norm() / expected.norm()
        if not error < 1e-4:
            raise AssertionError(f"{name}: the relative error is {error:.1e}, so there is nothing to compare")
        return ratio_row(name, ours, theirs, BOUND, rounds=rounds, round_s=0.0)


def unet_rows() -> list[Row]:
    with torch.device("meta"):
        theirs = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    ours = UNet(device="meta")
    share(theirs, ours, unet_names.diffusers_names(SD1.unet))
    text, timestep = torch.randn(2, 77, 768), torch.tensor([500])

    def step(x: Tensor) -> Tensor:
        ours.set_timestep(timestep)
        ours.set_clip_text_embedding(text)
        return ours(x)

    rows: list[Row] = []
    for size in SIZES:
        x = torch.randn(2, 4, size, size)
        rows.append(
            compare(
                f"UNet step, latents {size}x{size}",
                lambda x=x: step(x),
                lambda x=x: theirs(x, timestep, text).sample,
                ROUNDS[size],
            )
        )
    return [*rows, memory_row(lambda: step(torch.randn(2, 4, 8, 8)))]


@torch.no_grad()
def memory_row(step: Callable[[], Tensor]) -> Row:
    """What the process holds after 20 steps beside what it held after 5."""
    held: list[int] = []
    for count in (5, 15):
        for _ in range(count):
            step()
        held.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    before, after = held
    return Row("memory after 20 steps / after 5", after / 1e6, before / 1e6, "MB", MEMORY_BOUND, after / before)


def autoencoder_rows() -> list[Row]:
    with torch.device("meta"):
        theirs: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=SD1.autoencoder.channels,
            layers_per_block=2,
        )
    ours = LatentDiffusionAutoencoder(device="meta")
    share(theirs, ours, autoencoder_names.diffusers_names(SD1.autoencoder))
    scale = SD1.autoencoder.latent_scale
    rows: list[Row] = []
    for size in SIZES:
        x = torch.randn(1, 4, size, size)
        rows.append(
            compare(
                f"autoencoder decode, latents {size}x{size}",
                lambda x=x: ours.decode(x),
                lambda x=x: theirs.decode(x / scale).sample,
                ROUNDS[size],
            )
        )
    return rows


def text_rows() -> list[Row]:
    with torch.device("meta"):
        theirs: Any = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, hidden_act="quick_gelu")
        )
    theirs.to_empty(device="cpu")  # its position ids are no parameters
    ours = CLIPTextEncoderL(device="meta")
    for name, buffer in theirs.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(77)[None])
    share(theirs, ours, text_encoder_names())
    ids = torch.randint(0, 49406, (2, 77))
    ids[:, 0], ids[:, -1] = 49406, 49407
    return [compare("text encoder, 2 prompts", lambda: ours(ids), lambda: theirs(ids).last_hidden_state, rounds=40)]


LOADS = {
    "ours": """
from refiners.foundationals.latent_diffusion import StableDiffusion_1
import torch
start(); model = StableDiffusion_1.from_pretrained(folder)
with torch.no_grad():
    model(torch.randn(1, 4, 8, 8), step=0, clip_text_embedding=torch.randn(2, 77, 768))
""",
    "peer": """
from diffusers import StableDiffusionPipeline
import torch
from transformers import CLIPTextModel, CLIPTokenizer
from diffusers import AutoencoderKL, UNet2DConditionModel, DPMSolverMultistepScheduler
start(); model = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
with torch.no_grad():
    model.scheduler.set_timesteps(30)
    model.unet(torch.randn(2, 4, 8, 8), model.scheduler.timesteps[0], torch.randn(2, 77, 768))
""",
}
# VmHWM is the most memory so far; writing 5 to clear_refs starts it anew (proc(5)).
HARNESS = """
import json, sys, time
folder = sys.argv[1]
def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
def start():
    global began, before
    open("/proc/self/clear_refs", "w").write("5")
    began, before = time.perf_counter(), memory("VmRSS:")
{body}
print(json.dumps([time.perf_counter() - began, memory("VmHWM:") - before]))
"""


def loading_rows() -> list[Row]:
    """Time from the call to the end of the first step, in fresh processes in turn, and the most memory on the way."""
    with tempfile.TemporaryDirectory() as folder:
        model = StableDiffusion_1(device="meta")
        tensors = {name: torch.randn(tensor.shape) * 0.01 for name, tensor in model.state_dict().items()}
        model.load_state_dict(tensors, assign=True)
        model.save_pretrained(folder)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
        del model, tensors
        measured: dict[str, list[list[float]]] = {"ours": [], "peer": []}
        for _ in range(LOAD_ROUNDS):
            for name, body in LOADS.items():
                code = HARNESS.format(body=body)
                done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
                measured[name].append(json.loads(done.stdout.splitlines()[-1]))
    times = {name: sorted(time for time, _ in values)[LOAD_ROUNDS // 2] for name, values in measured.items()}
    peaks = {name: max(peak for _, peak in values) for name, values in measured.items()}
    return [
        Row("load and first step", times["ours"], times["peer"], "s ", 0.5, times["ours"] / times["peer"]),
        Row(
            "peak memory of that / size of the weights (ours against the bound)",
            peaks["ours"] / 1e6,
            peaks["peer"] / 1e6,
            "MB",
            1.1,
            peaks["ours"] / size,
        ),
    ]


def xl_rows() -> list[Row]:
    """A step of Stable Diffusion XL with all its layers at half their width, as both whole UNets would be 20 GB."""
    spec = replace(SDXL.unet, channels=tuple(width // 2 for width in SDXL.unet.channels))
    config = write_spec(replace(SDXL, unet=spec))["unet/config.json"]
    with torch.device("meta"):
        theirs: Any = UNet2DConditionModel.from_config(json.loads(config))
    ours = UNet(spec, device="meta")
    share(theirs, ours, unet_names.diffusers_names(spec))
    x, timestep = torch.randn(2, 4, XL_SIZE, XL_SIZE), torch.tensor([500])
    text, pooled = torch.randn(2, 77, spec.text_dim), torch.randn(2, spec.pooled_text_dim)
    time_ids = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2)
    added = {"text_embeds": pooled, "time_ids": time_ids}

    def step() -> Tensor:
        ours.set_timestep(timestep)
        ours.set_clip_text_embedding(text)
        ours.set_pooled_text_embedding(pooled)
        ours.set_time_ids(time_ids)
        return ours(x)

    return [
        compare(
            f"SDXL UNet step, half as wide, latents {XL_SIZE}x{XL_SIZE}",
            step,
            lambda: theirs(x, timestep, text, added_cond_kwargs=added).sample,
            ROUNDS[XL_SIZE],
        )
    ]


def rows() -> Iterator[Row]:
    for part in (text_rows, autoencoder_rows, unet_rows, xl_rows, loading_rows):
        yield from part()
