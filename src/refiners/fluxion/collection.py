"""Keeps Python's garbage collector out of work that makes many objects and drops none."""

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Generator[None]:
    """Inside `with`, garbage is not looked for, which for thousands of new layers would walk through all objects.

    To put a LoRA of 150 MB onto Stable Diffusion 1.5 took 0.43 s rather than 0.47, or 0.9 with a walk through all.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
