"""`refiners train`: a recipe, as its TOML file says."""

from typing import Annotated

import typer

from refiners.cli.errors import Debug

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file; examples are in configs/.")]


def train(config: Config, debug: Debug = False) -> None:
    """Train as a TOML file says.

    The same command again goes on from the last checkpoint. On several devices: torchrun -m refiners.cli train CONFIG.
    """
    from refiners.training.command import main

    main([config, *(["--debug"] if debug else [])])
