"""LoRA files on Stable Diffusion 1.5 at full size, against diffusers and peft: loading, running unmerged, swapping."""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from bench.diffusion import share
from bench.timing import Row, compared, times
from refiners.foundationals.latent_diffusion import SD1, StableDiffusion_1, unet_names
from refiners.foundationals.latent_diffusion.lora import LoraWeights
from refiners.foundationals.latent_diffusion.lora.loras import Loras
from refiners.foundationals.latent_diffusion.lora.places import find_layers
from refiners.weights.files import write_safetensors

LOADED_RANK = 176  # on all linear layers of the UNet's transformers, in half precision: about 150 MB
LOAD_ROUNDS = 5
RUN_RANK = 16
SIZE = 64


def write_lora(path: Path, model: Any, rank: int, wanted: Callable[[str], bool], seed: int = 0) -> None:
    """A file in kohya's form, at random weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in find_layers(model).values():
        place = layer.place
        if place.layer in ("linear", "convolution") and wanted(place.dotted_name):
            out, *inner = place.shape
            down = torch.randn(rank, *inner, generator=generator) / rank
            up = 0.01 * torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator)
            name = place.flat_name
            tensors |= {f"{name}.lora_down.weight": down.half(), f"{name}.lora_up.weight": up.half()}
            tensors[f"{name}.alpha"] = torch.tensor(float(rank) / 2)
    write_safetensors(path, tensors)


def is_attention(name: str) -> bool:
    return name.startswith("unet.") and ("attn" in name or ".proj_" in name or ".ff." in name)


def both() -> tuple[Any, Any]:
    """Our UNet and diffusers', with the very same tensors, and what a LoRA goes onto on each side."""
    with torch.device("meta"):
        theirs: Any = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    model = StableDiffusion_1(device="meta")
    share(theirs, model.unet, unet_names.diffusers_names(SD1.unet))
    nothing: Any = None
    pipeline = StableDiffusionPipeline(
        nothing, nothing, nothing, theirs, nothing, nothing, nothing, requires_safety_checker=False
    )
    return SimpleNamespace(unet=model.unet, clip_text_encoder=model.clip_text_encoder), pipeline


def step_of(unet: Any, is_ours: bool, x: Tensor, text: Tensor) -> Callable[[], Tensor]:
    timestep = torch.tensor([500])

    def ours() -> Tensor:
        unet.set_timestep(timestep)
        unet.set_clip_text_embedding(text)
        return unet(x)

    return torch.no_grad()(ours if is_ours else lambda: unet(x, timestep, text).sample)


def loading_row(model: Any, pipeline: Any, folder: Path) -> Row:
    path = folder / "large.safetensors"
    write_lora(path, model, LOADED_RANK, is_attention)

    measured: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(LOAD_ROUNDS):
        start = time.perf_counter()
        weights = LoraWeights(path)
        weights.patch(model)
        measured["ours"].append(time.perf_counter() - start)
        weights.eject()
        start = time.perf_counter()
        pipeline.load_lora_weights(str(path), adapter_name="large")
        measured["theirs"].append(time.perf_counter() - start)
        pipeline.unload_lora_weights()
    name = f"load a LoRA of {path.stat().st_size / 1e6:.0f} MB"
    return compared(name, measured["ours"], measured["theirs"], 0.5)


def running_rows(model: Any, pipeline: Any, folder: Path) -> Iterator[Row]:
    """Unmerged steps against the base's, and against peft's with the same files."""
    x, text = torch.randn(2, 4, SIZE, SIZE), torch.randn(2, 77, 768)
    ours, theirs = step_of(model.unet, True, x, text), step_of(pipeline.unet, False, x, text)
    base = model.unet.structural_copy()
    plain = step_of(base, True, x, text)
    loras = Loras(model, {})
    for count, bound in ((1, 1.05), (4, 1.10)):
        names = [f"lora_{index}" for index in range(count)]
        for index, name in enumerate(names):
            if name not in loras:
                path = folder / f"{name}.safetensors"
                write_lora(path, model, RUN_RANK, is_attention, seed=index)
                loras.add(path)
                pipeline.load_lora_weights(str(path), adapter_name=name)
        pipeline.set_adapters(names)
        expected = theirs()
        error = (ours() - expected).norm() / expected.norm()
        if not error < 1e-4:
            raise AssertionError(f"with {count} LoRAs the relative error is {error:.1e}: there is nothing to compare")
        measured = times({"ours": ours, "peft": theirs, "base": plain}, rounds=5, round_s=0.0)
        title = f"step with {count} LoRA unmerged, latents {SIZE}x{SIZE}"
        yield compared(f"{title} / base", measured["ours"], measured["base"], bound)
        yield compared(f"{title} / peft", measured["ours"], measured["peft"], 1.0)
    loras.clear()
    pipeline.unload_lora_weights()


def swap_row(model: Any, folder: Path) -> Row:
    """The time to put another file in a slot."""
    slot = Loras(model, {}).reserve(RUN_RANK)
    paths = [folder / f"lora_{index}.safetensors" for index in range(2)]
    files = [LoraWeights(path) for path in paths]
    turn = iter(range(10**9))
    measured = times({"swap": lambda: slot.load(files[next(turn) % 2])}, rounds=9, round_s=0.0)
    seconds = sorted(measured["swap"])[len(measured["swap"]) // 2]
    return Row("swap a LoRA in a slot, seconds", seconds * 1e3, 0.0, "ms", 0.05, seconds)


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, pipeline = both()
        yield loading_row(model, pipeline, folder)
        yield from running_rows(model, pipeline, folder)
        yield swap_row(model, folder)
