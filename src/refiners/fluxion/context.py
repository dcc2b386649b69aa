"""Contexts: named side data for deep layers, and the ambient device and dtype of construction."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from refiners.weights.devices import check_is_available

Context = dict[str, Any]
Contexts = dict[str, Context]


class ContextError(KeyError):
    """A context, or a key of one, that was not set before the call that reads it."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


@contextmanager
def placed(device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Generator[None]:
    """Build layers on `device` and in `dtype`, without naming them at each layer.

    None leaves the ambient choice (an outer `placed`, or torch's default) as it is.
    Raises RuntimeError for a device that this machine, or this build of torch, does not have.

    >>> with placed(device="meta", dtype=torch.float16):
    ...     torch.empty(2).dtype, torch.empty(2).device.type
    (torch.float16, 'meta')
    """
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        if device is not None:
            check_is_available(device)
            stack.enter_context(torch.device(device))
        if dtype is not None:
            torch.set_default_dtype(dtype)
            stack.callback(torch.set_default_dtype, before)
        yield
