"""Edits that happen whole or not at all."""

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Undo = Callable[[], None]
_journal: ContextVar[list[Undo] | None] = ContextVar("journal", default=None)


def record(undo: Undo) -> None:
    """Note how to take back the edit that was just made; forgotten at once outside a `transaction`."""
    journal = _journal.get()
    if journal is not None:
        journal.append(undo)


@contextmanager
def transaction() -> Generator[None]:
    """Make the edits inside happen whole or not at all: if anything raises, every tree is as it was before.

    Covers edits of chains (insert, replace, remove, …) and adapters (inject, eject, add_lora, …), in any number of
    trees. Transactions nest.
    """
    outer, journal = _journal.get(), list[Undo]()
    token = _journal.set(journal)
    try:
        yield
    except BaseException:
        for undo in reversed(journal):
            undo()
        raise
    else:
        if outer is not None:
            outer.extend(journal)
    finally:
        _journal.reset(token)


def whole_or_not_at_all(method: Callable[P, R]) -> Callable[P, R]:
    """Make each call of `method` one transaction."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with transaction():
            return method(*args, **kwargs)

    return call
