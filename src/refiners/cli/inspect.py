"""`refiners inspect`: what a model or a file is, without loading it."""

from pathlib import Path
from typing import Annotated

import typer

from refiners.cli.errors import Debug, reported_errors

Target = Annotated[str, typer.Argument(metavar="MODEL_OR_FILE", help="As --model of generate; or any weights file.")]
Depth = Annotated[int, typer.Option(min=0, help="How many levels of the tree to show.")]
ModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Of a LoRA: the model to attach to, if not a released one."),
]


def inspect(target: Target, depth: Depth = 1, model: ModelName = None, debug: Debug = False) -> None:
    """Show what a model is made of, or what a weights file is and whether it would fit. Weights are not read."""
    with reported_errors(debug):
        from refiners.cli.reports import report_file, report_lora, report_model
        from refiners.cli.sources import find_lora

        lora = find_lora(target)
        if lora is not None:
            report_lora(lora, model)
        elif Path(target).is_file():
            report_file(Path(target), depth)
        else:
            report_model(target, depth)
