"""Denoising steps: one after another they take no more memory, they compile whole, and low precision is close."""

import gc
from typing import Any

import numpy as np
import pytest
import torch
from diffusion_specimens import psnr, small_model
from torch import Tensor, nn

from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.solvers import DDIM, DPMSolver, Solver

SIZE = (1, 4, 8, 8)


def take_steps(model: Any, count: int, x: Tensor, text: Tensor) -> Tensor:
    for step in model.steps[:count]:
        x = model(x, step=step, clip_text_embedding=text)
    return x


def live_bytes() -> int:
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
    tensors = [each for each in tensors if each.layout == torch.strided]  # others, of other tests, have no storage
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("solver", [DDIM(30), DPMSolver(30)], ids=["ddim", "dpm-solver"])
def test_steps_leave_nothing_behind(solver: Solver) -> None:
    model = small_model(solver=solver)
    text, x = torch.randn(2, 77, 32), torch.randn(SIZE)
    with torch.no_grad():
        x = take_steps(model, 5, x, text)
        before = live_bytes()
        for step in model.steps[5:20]:
            x = model(x, step=step, clip_text_embedding=text)
        assert live_bytes() == before


@pytest.mark.slow
def test_a_whole_step_compiles_without_a_break_into_a_first_a_middle_and_a_last_one() -> None:
    """UNet, guidance and solver in one graph; the step is a number in it, however many there are."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    model, counter = small_model(solver=DPMSolver(10)), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    text, x = torch.randn(2, 77, 32), torch.randn(SIZE)
    with torch.no_grad():
        expected = take_steps(model, 10, x, text)
        for step in model.steps:
            x = compiled(x, step=step, clip_text_embedding=text)
    assert counter.frame_count <= 3
    assert (x - expected).norm() / expected.norm() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "closeness"), [(torch.bfloat16, 40), (torch.float16, 50)])
def test_pictures_in_half_precision_on_the_cpu_are_close(dtype: torch.dtype, closeness: float) -> None:
    prompts, settings = ["a red circle above a blue square", "a green star on black"], {"num_inference_steps": 4}
    full, half = (
        StableDiffusion_1.from_pretrained("builtin", dtype=each).generate(
            prompts, seed=[1, 2], show_progress=False, **settings
        )
        for each in (torch.float32, dtype)
    )
    whole = torch.from_numpy(np.stack([np.asarray(image) for image in full])).double() / 255
    assert psnr(half, whole) > closeness
