"""Train a LoRA: `python scripts/training/finetune-ldm-lora.py configs/finetune-lora.toml`."""

from refiners.cli.train import main

if __name__ == "__main__":
    main(recipe="lora")
