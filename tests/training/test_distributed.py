"""Several processes train as one does: the same losses and weights, and checkpoints that any number can go on from.

Each case runs as this file under `torchrun`, with gloo on the CPU.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from training_specimens import SMALL, Losses, config, small_model

from refiners.adapters.lora import LoraAdapter
from refiners.fluxion.utils import load_from_safetensors
from refiners.foundationals.latent_diffusion.unet import ResidualBlock, TransformerLayer
from refiners.training import Callback, DiffusionLoss, Trainer, joined, recompute
from refiners.training.checkpoint import load_checkpoint, newest_checkpoint
from refiners.training.data.latents import DiffusionBatch
from refiners.training.recipes.text_to_image import make_objective

pytestmark = pytest.mark.slow
BLOCKS = (ResidualBlock, TransformerLayer)
STEPS, BATCH = 6, 4


class Batches:
    """Latents, noise and text by place."""

    def __len__(self) -> int:
        return 3

    def get(self, epoch: int, index: int, rank: int, count: int) -> DiffusionBatch:
        generator = torch.Generator().manual_seed(100 * epoch + index)

        def draw(*shape: int) -> Tensor:
            return torch.randn(BATCH, *shape, generator=generator).chunk(count)[rank]

        timesteps = torch.randint(1000, (BATCH,), generator=generator).chunk(count)[rank]
        ones = torch.ones(BATCH // count)
        return DiffusionBatch(
            draw(4, 8, 8), draw(4, 8, 8), timesteps, ones, [], embeddings=draw(5, SMALL.unet.text_dim)
        )


class BadBatches(Batches):
    """Others, of which the last process gets one that is not finite."""

    def get(self, epoch: int, index: int, rank: int, count: int) -> DiffusionBatch:
        batch = super().get(epoch, index, rank, count)
        is_bad = (epoch, index, rank) == (1, 1, count - 1)
        return replace(batch, latents=batch.latents * torch.inf) if is_bad else batch


class Pause(Callback):
    """Lets a step take a while, and says which one it is."""

    def on_step_end(self, trainer: Trainer) -> None:
        print(f"step {trainer.clock.step}", flush=True)
        time.sleep(0.2)


def run(folder: Path, steps: int = STEPS, parallel: str = "ddp", what: str = "lora", pause: bool = False) -> None:
    """Train a small UNet, and write the losses of this run to a file."""
    torch.set_num_threads(1)
    with joined("cpu") as process:
        sd, losses = small_model(), Losses()
        trained = None
        if what == "lora":
            adapters = [
                LoraAdapter(layer, rank=2).inject(parent) for layer, parent in list(sd.unet.walk(torch.nn.Linear))
            ]
            trained = {f"{i}.{n}": p for i, a in enumerate(adapters) for n, p in a.loras["lora"].named_parameters()}
        blocks: list[Any] = [module for module in sd.unet.modules() if isinstance(module, BLOCKS)]
        if what == "recomputed":
            blocks = list(recompute(sd.unet, BLOCKS))
        training = {
            "duration": f"{steps}:step", "batch_size": BATCH, "parallel": parallel, "ema_decay": 0.5,
            "gradient_accumulation": "2:iteration", "clip_grad_norm": 0.5,
        }  # fmt: skip
        settings = config(folder, training=training, optimizer={"learning_rate": 0.003}, checkpointing={"keep": 9})
        trainer = Trainer(
            {"unet": sd.unet}, make_objective(sd, DiffusionLoss()), BadBatches() if what == "bad" else Batches(),
            settings, trained=trained,
            callbacks=[losses, *([Pause()] if pause else [])], process=process, blocks=blocks,
        )  # fmt: skip
        trainer.train()
        if process.is_first:
            (folder / f"losses-{len(list(folder.glob('losses-*')))}.json").write_text(json.dumps(losses.values))


def launch(count: int, *command: str) -> "subprocess.Popen[str]":
    """Run a script with arguments in so many processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    start = [sys.executable, "-W", "ignore"]
    if count > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.Popen(
        [*start, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(count: int, folder: Path, **arguments: Any) -> list[float]:
    """Train in processes of their own; the losses of all runs in this folder, one after the other."""
    folder.mkdir(exist_ok=True)
    wait_for(launch(count, __file__, str(folder), json.dumps(arguments)))
    return [loss for path in sorted(folder.glob("losses-*")) for loss in json.loads(path.read_text())]


def wait_for(process: "subprocess.Popen[str]") -> None:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[float]]]:
    """What one process does."""
    folders = {what: tmp_path_factory.mktemp(what) for what in ("lora", "all")}
    return {what: (folder, finish(1, folder, what=what)) for what, folder in folders.items()}


def assert_same_end(one: Path, other: Path) -> None:
    paths = [newest_checkpoint(folder / "checkpoints") for folder in (one, other)]
    assert paths[0] is not None and paths[1] is not None
    left, right = load_checkpoint(paths[0]), load_checkpoint(paths[1])
    for part in ("weights", "mean_weights"):
        assert list(left[part]) == list(right[part])
        for name, weight in left[part].items():
            torch.testing.assert_close(right[part][name], weight, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("parallel", "what"), [("ddp", "lora"), ("fsdp", "lora"), ("fsdp", "all"), ("fsdp", "recomputed")]
)
def test_two_processes_have_the_losses_of_one(
    tmp_path: Path, alone: dict[str, tuple[Path, list[float]]], parallel: str, what: str
) -> None:
    folder, expected = alone["lora" if what == "lora" else "all"]
    losses = finish(2, tmp_path, parallel=parallel, what=what)
    assert len(losses) == STEPS and losses == pytest.approx(expected, rel=1e-5)
    assert_same_end(folder, tmp_path)


@pytest.mark.parametrize(("parallel", "counts"), [("ddp", (2, 1)), ("fsdp", (1, 2)), ("fsdp", (2, 1))])
def test_another_number_of_processes_goes_on_from_a_checkpoint(
    tmp_path: Path, alone: dict[str, tuple[Path, list[float]]], counts: tuple[int, int], parallel: str
) -> None:
    folder, expected = alone["lora"]
    finish(counts[0], tmp_path, steps=3, parallel=parallel)
    losses = finish(counts[1], tmp_path, parallel=parallel)
    assert len(losses) == STEPS and losses == pytest.approx(expected, rel=1e-5)
    assert_same_end(folder, tmp_path)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("is_asked", [False, True], ids=["a worker dies", "torchrun is told to stop"])
def test_when_one_ends_all_end_and_the_same_command_goes_on(
    tmp_path: Path, alone: dict[str, tuple[Path, list[float]]], is_asked: bool
) -> None:
    process = launch(2, __file__, str(tmp_path), json.dumps({"pause": True}))
    assert process.stdout is not None
    while "step 4" not in process.stdout.readline():
        assert process.poll() is None
    workers = children_of(process.pid)
    assert len(workers) == 2
    os.kill(process.pid if is_asked else workers[1], signal.SIGTERM if is_asked else signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    newest = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    if is_asked:
        assert f"stopped by SIGTERM after step {int(newest.name[5:])}, which is saved in" in output
        assert newest.name >= "step-00000004"
    else:
        assert "ConnectionError: process 0 of 2 has lost another one" in output and newest.name >= "step-00000003"
    losses = finish(2, tmp_path)
    folder, expected = alone["lora"]
    assert losses == pytest.approx(expected[-len(losses) :], rel=1e-5)
    assert_same_end(folder, tmp_path)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_batch_of_one_process_that_is_not_finite_stops_all_and_the_state_before_it_is_kept(
    tmp_path: Path, parallel: str
) -> None:
    arguments = {"parallel": parallel, "what": "bad"}
    process = launch(2, __file__, str(tmp_path), json.dumps(arguments))
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    assert "NonFiniteError: step 3 was not made, as its loss is nan" in output
    assert "the first bad layer is unet." in output and "not finite, and neither are its inputs" in output
    newest = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-00000002"


RESULTS = {
    "lora": "result.safetensors",
    "finetune": "result/unet",
    "control_net": "result",
    "t2i_adapter": "result.safetensors",
    "ip_adapter": "result.safetensors",
    "textual_inversion": "result.safetensors",
}


@pytest.mark.parametrize("recipe", RESULTS)
def test_a_recipe_on_sharded_weights_gives_the_file_of_one_process(
    tmp_path: Path, model_folder: Path, picture_folder: Path, recipe: str
) -> None:
    results: list[dict[str, Tensor]] = []
    others, more = tmp_path / "others", ""
    if recipe == "textual_inversion":
        more = 'textual_inversion.initial_text = "red disc"\n'
    elif recipe not in ("lora", "finetune"):  # led by pictures
        shutil.copytree(picture_folder, others)
        more = f'dataset.conditioning_folder = "{others}"\ntest_diffusion.conditioning = ["{others}/00.png"]\n'
    for count in (1, 2):
        out = tmp_path / str(count)
        path = tmp_path / f"{count}.toml"
        path.write_text(
            f'recipe = "{recipe}"\nmodels.base = "{model_folder}"\n{more}'
            f'dataset.folder = "{picture_folder}"\ndataset.held_out = 2\n'
            f'checkpointing.save_folder = "{out}"\ncheckpointing.save_interval = "2:step"\n'
            'training.duration = "3:step"\ntraining.batch_size = 2\ntraining.device = "cpu"\n'
            'training.parallel = "fsdp"\ntraining.ema_decay = 0.5\ntraining.evaluation_interval = "2:step"\n'
            f'test_diffusion.prompts = ["a disc"]\ntest_diffusion.num_inference_steps = 2\n{recipe}.name = "result"\n'
        )
        wait_for(launch(count, "-m", "refiners.cli", "train", str(path)))
        result = out / RESULTS[recipe]
        (file,) = result.glob("*.safetensors") if result.is_dir() else [result]
        results.append(load_from_safetensors(file))
        assert len(list((out / "samples").glob("*.png"))) == 2 and list((out / "logs").iterdir())
    assert list(results[0]) == list(results[1])
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


if __name__ == "__main__":
    run(Path(sys.argv[1]), **json.loads(sys.argv[2]))
