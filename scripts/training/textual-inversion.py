"""Find vectors for a new word: `python scripts/training/textual-inversion.py configs/textual-inversion.toml`."""

from refiners.cli.train import main

if __name__ == "__main__":
    main(recipe="textual_inversion")
