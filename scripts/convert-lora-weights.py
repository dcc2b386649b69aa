"""Write a LoRA of any format for Stable Diffusion 1 as one file that `LoraWeights` and web UIs read.

python scripts/convert-lora-weights.py --from pytorch_lora_weights.bin --output-file pokemon_lora.safetensors
"""

from pathlib import Path
from typing import Annotated

import typer

from refiners.cli.convert import Half, ModelName, convert
from refiners.cli.errors import Debug


def script(
    source: Annotated[str, typer.Option("--from", help="A LoRA file, or a folder as peft and diffusers save it.")],
    target: Annotated[Path, typer.Option("--output-file", help="The file to write.")] = Path("lora.safetensors"),
    half: Half = False,
    model: ModelName = None,
    debug: Debug = False,
) -> None:
    """Write a LoRA of any format as one file."""
    convert(source, target, "kohya", half, model, debug)


if __name__ == "__main__":
    typer.run(script)
