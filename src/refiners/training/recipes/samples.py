"""What text-to-image recipes leave for their users: pictures to look at on the way, and the result."""

from collections.abc import Callable
from pathlib import Path

from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.training.data.pictures import decode
from refiners.training.recipes.config import DiffusionTestConfig
from refiners.training.recipes.leading import Lead
from refiners.training.trainer import Callback, Trainer


class SaveSamples(Callback):
    """Makes a picture of each test prompt at each evaluation, always from the same noise.

    lead: what is shown the pictures that come with the prompts.
    """

    def __init__(self, sd: StableDiffusion_1, config: DiffusionTestConfig, lead: Lead | None = None) -> None:
        self.sd, self.config, self.lead = sd, config, lead

    def on_evaluate(self, trainer: Trainer) -> None:
        """Write `<save_folder>/samples/step-00000100-0.png` and so on."""
        if not self.config.prompts:
            return
        if self.lead is not None:
            self.lead.show([decode(path.read_bytes(), str(path)) for path in self.config.conditioning])
        images = self.sd.generate(
            self.config.prompts,
            seed=self.config.seed,
            num_inference_steps=self.config.num_inference_steps,
            condition_scale=self.config.condition_scale,
            show_progress=False,
        )
        if trainer.process.is_first:
            folder = trainer.folder / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(images):
                image.save(folder / f"step-{trainer.clock.step:08d}-{number}.png")
        for callback in trainer.callbacks:
            callback.on_images(trainer, "samples", images)


class SaveResult(Callback):
    """Saves the result at the end and, if it is small, beside each checkpoint.

    save: writes below a folder and returns where.
    """

    def __init__(self, save: Callable[[Path], Path], saves_often: bool) -> None:
        self.save, self.saves_often = save, saves_often
        self.path: Path | None = None

    def on_checkpoint(self, trainer: Trainer) -> None:
        if self.saves_often and trainer.clock.step < trainer.total_steps:
            with trainer.mean_weights():
                self._save(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        with trainer.whole_weights():
            if trainer.process.is_first:
                trainer.folder.mkdir(parents=True, exist_ok=True)
                self.path = self.save(trainer.folder)
