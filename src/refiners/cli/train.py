"""`refiners train`: a recipe, as its TOML file says; and the same as a script of one recipe."""

from typing import Annotated

import typer

from refiners.cli.errors import Debug, complain, reported_errors

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file; examples are in configs/.")]
LESS_MEMORY = "lower training.batch_size, set training.gradient_checkpointing = true, or choose a smaller models.dtype"


def train(config: Config, debug: Debug = False) -> None:
    """Train as a TOML file says.

    The same command again goes on from the last checkpoint. On several devices: torchrun -m refiners.cli train CONFIG.
    """
    run(config, debug)


def main(recipe: str) -> None:
    """Train by one recipe, as the file says that the process's arguments name."""

    def command(config: Config, debug: Debug = False) -> None:
        """Train as a TOML file says. The same command again goes on from the last checkpoint."""
        run(config, debug, recipe)

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()


def run(config: str, debug: bool, recipe: str | None = None) -> None:
    """Train; exit with 1 after a mistake, a line for each, with 130 after Ctrl-C and with 143 after SIGTERM.

    recipe: a name in `RECIPES`; None for the one that the file names.
    """
    with reported_errors(debug, less_memory=LESS_MEMORY):
        from refiners.training import ConfigError, NonFiniteError, TrainingInterrupted
        from refiners.training.recipes.registry import train

        try:
            train(config, recipe)
        except (ConfigError, NonFiniteError) as error:
            if debug:
                raise
            complain(*str(error).splitlines())
        except TrainingInterrupted as stop:
            typer.echo(stop, err=True)
            raise typer.Exit(128 + stop.number) from None
        except KeyboardInterrupt:
            typer.echo("stopped; the same command goes on from the last checkpoint", err=True)
            raise typer.Exit(130) from None
