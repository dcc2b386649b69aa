"""Training from a command line: one argument, the config; a mistake of the user is one line, not a traceback."""

import argparse
import sys
from collections.abc import Sequence

from refiners.training.guard import NonFiniteError
from refiners.training.interruption import TrainingInterrupted
from refiners.training.recipes.registry import train


def main(arguments: Sequence[str] | None = None, recipe: str | None = None) -> None:
    """Train as the config says that the arguments name.

    Exits with a message: with 1 where it cannot go on, with 130 after Ctrl-C, with 143 after SIGTERM. With `--debug`
    errors are raised instead.
    """
    parser = argparse.ArgumentParser(description="Train as a TOML file says; the same command again goes on.")
    parser.add_argument("config", help="a TOML file; examples are in configs/")
    parser.add_argument("--debug", action="store_true", help="on an error, show where in the code it happened")
    given = parser.parse_args(arguments)
    try:
        train(given.config, recipe)
    except TrainingInterrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ModuleNotFoundError, NonFiniteError) as error:
        if given.debug:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        for line in getattr(error, "__notes__", []):
            print(line, file=sys.stderr)
        sys.exit(1)
