"""Train all weights of a model: `python scripts/training/finetune-ldm.py configs/finetune.toml`."""

from refiners.cli.train import main

if __name__ == "__main__":
    main(recipe="finetune")
