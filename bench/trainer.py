"""The trainer, as the LoRA recipe runs it, against the same training as a bare loop, on the embedded model."""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.timing import Row
from refiners.fluxion.utils import manual_seed
from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.solvers import SolverParams
from refiners.training import Callback, DiffusionLoss, Process, Trainer
from refiners.training.recipes.lora import LoraTrainingConfig, inject_loras
from refiners.training.recipes.text_to_image import Choice, make_objective, read_pictures, train

BOUND, STEPS, WARM_STEPS = 1.02, 100, 5
PICTURES = Path(__file__).parents[1] / "configs" / "pictures"


class BareLoop(Callback):
    """After each step of the trainer, makes the same one by hand on a model of its own, and times both."""

    def __init__(self, sd: StableDiffusion_1, choice: Choice, params: SolverParams) -> None:
        self.parameters = list(choice.parameters.values())
        sd.unet.requires_grad_(False).train()
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.compute_loss = make_objective(sd, DiffusionLoss(params))
        self.seconds: dict[str, list[float]] = {"ours": [], "peer": []}

    def on_train_begin(self, trainer: Trainer) -> None:
        self.optimizer = torch.optim.AdamW(self.parameters, lr=trainer.config.optimizer.learning_rate)
        self.last = time.perf_counter()

    def on_step_end(self, trainer: Trainer) -> None:
        after_trainer = time.perf_counter()
        self._accumulate(trainer)  # so that what is timed comes after a pass by hand, either way
        self.optimizer.zero_grad(set_to_none=True)
        start = time.perf_counter()
        loss = self._step(trainer).item()
        seconds = time.perf_counter() - start
        if loss != trainer.metrics["loss"]:
            raise AssertionError(f"the losses are {trainer.metrics['loss']} and {loss}: there is nothing to compare")
        if trainer.clock.step > WARM_STEPS:
            self.seconds["ours"].append(after_trainer - self.last)
            self.seconds["peer"].append(seconds)
        self.last = time.perf_counter()

    def _step(self, trainer: Trainer) -> Tensor:
        loss = self._accumulate(trainer)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _accumulate(self, trainer: Trainer) -> Tensor:
        batch = trainer.batches.get(*trainer.clock.batch_at(trainer.clock.iteration - 1), 0, 1)
        loss = self.compute_loss(batch)
        loss.backward()
        return loss


def trainer_rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder))
        ours, choice = make_model(config)
        loop = BareLoop(*make_model(config), ours.spec.solver_params)
        train(config, ours, read_pictures(config), choice, Process(), [loop])
    ratio = statistics.median(a / b for a, b in zip(loop.seconds["ours"], loop.seconds["peer"], strict=True))
    times = {name: statistics.median(values) * 1e3 for name, values in loop.seconds.items()}
    return [Row("trainer's step / bare loop, embedded model", times["ours"], times["peer"], "ms", BOUND, ratio)]


def make_model(config: LoraTrainingConfig) -> tuple[StableDiffusion_1, Choice]:
    sd = StableDiffusion_1.from_pretrained("builtin")
    manual_seed(0)
    return sd, inject_loras(sd, config.lora)


def make_config(folder: Path) -> LoraTrainingConfig:
    return LoraTrainingConfig.model_validate(
        {
            "dataset": {"folder": PICTURES},
            "training": {"duration": f"{STEPS}:step", "batch_size": 8, "device": "cpu"},
            "checkpointing": {"save_folder": folder, "save_interval": f"{STEPS}:step"},
        }
    )
