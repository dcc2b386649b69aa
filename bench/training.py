"""A training step of a LoRA on Stable Diffusion 1's UNet, against diffusers and peft; the trainer against a bare loop.

Both sides of a step hold the very same weights and get the same batch, and that their losses and gradients agree is
checked before anything is timed. Memory is that of fresh processes, the weights that do not train left out.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig as PeftConfig
from torch import Tensor, nn
from torch.nn import functional

from bench.diffusion import share
from bench.timing import Row, ratio_row
from bench.trainer import trainer_rows
from refiners.foundationals.clip import CLIPTextEncoderL
from refiners.foundationals.latent_diffusion import SD1, LatentDiffusionAutoencoder, StableDiffusion_1, UNet
from refiners.foundationals.latent_diffusion.unet_names import diffusers_names
from refiners.training import DiffusionLoss, recompute
from refiners.training.data.latents import DiffusionBatch
from refiners.training.recipes.lora import LoraConfig, inject_loras
from refiners.training.recipes.text_to_image import BLOCKS, make_objective

TIME_BOUND, MEMORY_BOUND = 0.9, 0.95
SIZE, RANK, RATE, ROUNDS = 32, 16, 1e-4, 3
MODES = {"plain": False, "gradient checkpointing": True}


def step_of(parameters: Iterable[nn.Parameter], compute_loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A step of training, which returns its loss: forward, backward, clipping, AdamW."""
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=RATE)

    def step() -> Tensor:
        loss = compute_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


class Side:
    """A UNet with a LoRA on its attention, in training; `compute_loss` is of a batch."""

    compute_loss: Callable[[DiffusionBatch], Tensor]

    def __init__(self, unet: nn.Module, mark: str) -> None:
        self.unet: Any = unet
        self.parameters = {name: parameter for name, parameter in unet.named_parameters() if mark in name}
        unet.requires_grad_(False).train()
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def step_on(self, batch: DiffusionBatch) -> Callable[[], Tensor]:
        return step_of(self.parameters.values(), lambda: self.compute_loss(batch))


class Ours(Side):
    """The recipe's own way from a batch to the loss."""

    def __init__(self, unet: UNet) -> None:
        encoder, lda = CLIPTextEncoderL(device="meta"), LatentDiffusionAutoencoder(device="meta")
        sd = StableDiffusion_1(unet, lda, encoder)
        inject_loras(sd, LoraConfig(rank=RANK))
        super().__init__(unet, ".LoraAdapter.")
        self.compute_loss = make_objective(sd, DiffusionLoss())

    def checkpoint(self) -> None:
        recompute(self.unet, BLOCKS)


class Theirs(Side):
    """What diffusers' script for training a LoRA does."""

    def __init__(self, unet: Any) -> None:
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(PeftConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False))
        super().__init__(unet, ".lora_")
        scheduler: Any = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)

        def compute_loss(batch: DiffusionBatch) -> Tensor:
            noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
            predicted = unet(noisy, batch.timesteps, batch.embeddings).sample
            return functional.mse_loss(predicted.float(), batch.noise.float())

        self.compute_loss = compute_loss

    def checkpoint(self) -> None:
        self.unet.enable_gradient_checkpointing()


def make_theirs() -> Any:
    return UNet2DConditionModel(cross_attention_dim=SD1.unet.text_dim, attention_head_dim=8)


def make_batch() -> DiffusionBatch:
    latents, noise = torch.randn(2, 1, 4, SIZE, SIZE).unbind()
    text = torch.randn(1, 77, SD1.unet.text_dim)
    return DiffusionBatch(latents, noise, torch.tensor([500]), torch.ones(1), [""], embeddings=text)


def make_pair() -> tuple[Ours, Theirs]:
    with torch.device("meta"):
        unet, other = UNet(), make_theirs()
    names = diffusers_names(SD1.unet)
    share(other, unet, names)
    ours, theirs = Ours(unet), Theirs(other)
    with torch.no_grad():
        for name, parameter in ours.parameters.items():
            parameter.copy_(theirs.parameters[peft_name(name, names)])
    return ours, theirs


def peft_name(name: str, names: Any) -> str:
    layer, _, part = name.partition(".LoraAdapter.")
    base = str(names.to_theirs(f"{layer}.weight")).removesuffix(".weight")
    return f"{base}.lora_{'A' if '.down.' in f'.{part}' else 'B'}.default.weight"


def check_agreement(ours: Ours, theirs: Theirs, batch: DiffusionBatch) -> None:
    """Raises AssertionError if the two do not compute the same, as then there is nothing to compare."""
    loss, expected_loss = ours.compute_loss(batch), theirs.compute_loss(batch)
    loss.backward()
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=0)
    names = diffusers_names(SD1.unet)
    for name, parameter in ours.parameters.items():
        found, expected = parameter.grad, theirs.parameters[peft_name(name, names)].grad
        assert found is not None and expected is not None, name
        error = (found - expected).norm() / expected.norm()
        if not error < 1e-3:
            raise AssertionError(f"{name}: the relative error of its gradient is {error:.1e}")
    for side in (ours, theirs):
        side.unet.zero_grad(set_to_none=True)


def step_rows() -> list[Row]:
    (ours, theirs), batch, rows = make_pair(), make_batch(), list[Row]()
    for mode, is_recomputed in MODES.items():
        if is_recomputed:
            ours.checkpoint()
            theirs.checkpoint()
        check_agreement(ours, theirs, batch)
        name = f"LoRA training step, {mode}"
        steps = ours.step_on(batch), theirs.step_on(batch)
        rows.append(ratio_row(name, *steps, TIME_BOUND, rounds=ROUNDS, round_s=0.0))
    return rows


def memory_rows() -> list[Row]:
    rows: list[Row] = []
    # with the threshold fixed, memory that is given back is given back to the system at once
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for mode, is_recomputed in MODES.items():
        peaks = list[float]()
        for side in ("ours", "theirs"):
            command = [sys.executable, "-m", "bench.training", side, *(["checkpoint"] if is_recomputed else [])]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            peaks.append(json.loads(done.stdout.splitlines()[-1]))
        name = f"peak memory of that beyond the UNet, {mode}"
        rows.append(Row(name, peaks[0], peaks[1], "MB", MEMORY_BOUND, peaks[0] / peaks[1]))
    return rows


def measure_memory(side: str, *options: str) -> float:
    """MB that the second step needs at most, beyond what there was before the first."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.device("meta"):
        unet: Any = UNet() if side == "ours" else make_theirs()
    unet.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(std=0.02)
    trained = Ours(unet) if isinstance(unet, UNet) else Theirs(unet)
    if options:
        trained.checkpoint()
    step, before = trained.step_on(make_batch()), read_status("VmRSS:")
    step()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM, the most memory so far, starts anew (proc(5))
    step()
    return (read_status("VmHWM:") - before) / 1e6


def read_status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024


def rows() -> Iterator[Row]:
    for part in (trainer_rows, memory_rows, step_rows):
        yield from part()


if __name__ == "__main__":
    print(json.dumps(measure_memory(*sys.argv[1:])))
