"""Teach a model one subject: `python scripts/training/dreambooth.py configs/dreambooth.toml`."""

from refiners.cli.train import main

if __name__ == "__main__":
    main(recipe="dreambooth")
