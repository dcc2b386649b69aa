"""`refiners demo`: teach the embedded model a shape that it never saw, and show that it learned it."""

from pathlib import Path
from typing import Annotated

import typer

from refiners.cli.errors import Debug, reported_errors

Folder = Annotated[Path, typer.Option(help="Where the pictures, the LoRA and the comparison go.")]
Steps = Annotated[int, typer.Option(min=1, help="Of training.")]


def demo(folder: Folder = Path("runs/demo"), steps: Steps = 160, debug: Debug = False) -> None:
    """Train a LoRA in minutes: a new shape for the embedded model, with pictures and scores before and after.

    Needs neither network nor GPU. The same command again goes on where it was stopped.
    """
    with reported_errors(debug):
        from refiners.training.demonstration import demonstrate

        result = demonstrate(folder, steps)
    for line in result.lines():
        typer.echo(line)
