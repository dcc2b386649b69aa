"""What belongs to a model without being in one of its trees, such as a guidance, and how a copy gets one of its own."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

from torch import nn

T = TypeVar("T")
# Each module of a model, the model itself first, with its counterpart in the copy.
Twins = Mapping[nn.Module, Any]


def twins_of(model: nn.Module, copy: nn.Module) -> Twins:
    """The modules of a model and those of its structural copy, side by side: both have the same names."""
    there = dict(_named(copy))
    return {module: there[name] for name, module in _named(model)}


def copied(value: T, twins: Twins) -> T:
    """What a copy of the model has in the place of a value: its own if the value has a method `copied`, or the same."""
    make_copy: Any = getattr(value, "copied", None)
    return value if make_copy is None else make_copy(twins)


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return cast("Iterator[tuple[str, nn.Module]]", model.named_modules(remove_duplicate=False))
