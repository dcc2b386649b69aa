"""Train the adapters that the documents show, on the embedded model, and write them to docs/trained in half precision.

python scripts/train-shown-adapters.py [heart] [boxes] [thing]    # the same command goes on where it was stopped
"""

import sys
import tomllib
from pathlib import Path

import torch

from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.lora import resize_lora
from refiners.training.demonstration import make_config, write_pictures
from refiners.training.distributed import Process
from refiners.training.recipes import lora
from refiners.training.recipes.registry import RECIPES
from refiners.weights import read_metadata, read_safetensors, write_safetensors

RUNS, TRAINED = Path("runs/shown"), Path("docs/trained")
SCENES = 1000  # fewer than in configs/: enough for a few pictures


def train_heart() -> None:
    """A LoRA as `refiners demo` trains it, at a smaller rank."""
    write_pictures(RUNS / "hearts")
    lora.run(make_config(RUNS / "heart", RUNS / "hearts", steps=240), Process())
    sd = StableDiffusion_1.from_pretrained("builtin")
    print(resize_lora(RUNS / "heart/heart.safetensors", TRAINED / "heart.safetensors", sd, rank=6, dtype=torch.float16))


def train_by_scenes(config: str, name: str, steps: int) -> None:
    """What a config of conditioning adapters trains, with fewer scenes."""
    table = tomllib.loads(Path("configs", config).read_text(encoding="utf-8"))
    table["training"] |= {"duration": f"{steps}:step", "evaluation_interval": f"{steps}:step"}
    table["dataset"]["scenes"] |= {"count": SCENES, "judged": 0}
    table["checkpointing"]["save_folder"] = RUNS / name
    recipe = RECIPES[table["recipe"]]
    recipe.run(recipe.config.read(table), Process())
    path = RUNS / name / f"{name}.safetensors"
    halves = {key: tensor.half() for key, tensor in read_safetensors(path).items()}
    write_safetensors(TRAINED / path.name, halves, metadata=read_metadata(path))


TRAININGS = {
    "heart": train_heart,
    "boxes": lambda: train_by_scenes("train-t2i-adapter.toml", "boxes", steps=400),
    "thing": lambda: train_by_scenes("train-ip-adapter.toml", "thing", steps=1200),
}

if __name__ == "__main__":
    TRAINED.mkdir(exist_ok=True)
    for name in sys.argv[1:] or TRAININGS:
        TRAININGS[name]()
