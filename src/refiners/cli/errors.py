"""How commands end when something is wrong: one red line and exit code 1, or with `--debug` the whole traceback."""

import errno
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer

Debug = Annotated[bool, typer.Option("--debug", help="On an error, show where in the code it happened.")]
_OUT_OF_MEMORY = ("out of memory", "not enough memory")  # as torch says it of a GPU and of the CPU
_FULL = (errno.ENOSPC, errno.EDQUOT)
_EXTRAS = {"pydantic": "training"}  # what is installed along with these modules, which not every command needs


@contextmanager
def reported_errors(
    debug: bool, less_memory: str = "try a smaller --size, --tile-size or --dtype float16"
) -> Generator[None]:
    """Turn errors that a user can cause into one line on stderr and exit code 1; others are bugs, and go through.

    Warnings are lines as well.

    less_memory: what to do if there is not enough memory.
    """
    form_before = warnings.formatwarning
    if not debug:
        warnings.formatwarning = _warning_line
    try:
        yield
    except (ValueError, OSError, MemoryError, RuntimeError, ModuleNotFoundError) as error:
        message = _message(error, less_memory)
        if debug or message is None:
            raise
        complain(message)
    finally:
        warnings.formatwarning = form_before


def _warning_line(message: Warning | str, *_: object) -> str:
    return f"warning: {' '.join(str(message).split())}\n"


def complain(*mistakes: str) -> NoReturn:
    """A red line for each mistake, and exit code 1."""
    for mistake in mistakes:
        typer.secho(f"error: {mistake}", fg="red", err=True, color=None if sys.stderr.isatty() else False)
    raise typer.Exit(1) from None


def _message(error: Exception, less_memory: str) -> str | None:
    """What to tell the user, in one line; None if the error is none of theirs."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
        return f"there is not enough memory ({text[:200]}); {less_memory}"
    if isinstance(error, ModuleNotFoundError) and error.name is not None:  # it has none where we raise it in words
        extra = _EXTRAS.get(error.name)
        return extra and f"this needs {error.name}, which is not installed: pip install 'refiners[{extra}]'"
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"{text}; make room on the disk, and give the same command again"
    is_broken_pipe = isinstance(error, BrokenPipeError)  # typer ends quietly on it
    return None if is_broken_pipe or isinstance(error, RuntimeError) else text
