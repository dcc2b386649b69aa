"""Looking at trees: printing them, and saying where in them an error happened. Knows modules only by what they hold."""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

from torch import Tensor, nn

NOTE_START = "in the tree: "


# -- printing


@dataclass
class _Group:
    """Neighbours that look the same, printed once."""

    slots: list[str]
    module: nn.Module
    lines: list[str]  # what stands below, without the branches of this level
    parameter_count: int

    @property
    def look(self) -> tuple[str, tuple[str, ...], int]:
        return (_describe(self.module), tuple(self.lines), self.parameter_count)


def render(module: nn.Module) -> str:
    """The tree as text: a line per module, repeated neighbours folded into `12 x Block`, parameters counted.

    Adapters are marked with `<+>`. Shared parameters count once in each line.
    """
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()})
    head = [_describe(module), *_counted(_count_parameters(module)), *dtypes]
    return "\n".join([", ".join(head), *_children_lines(module)])


def _children_lines(module: nn.Module) -> list[str]:
    if getattr(module, "is_printed_whole", False):
        return []
    groups: list[_Group] = []
    for slot, child in module._modules.items():
        if child is None:
            continue
        group = _Group([slot], child, _children_lines(child), _count_parameters(child))
        if groups and groups[-1].look == group.look:
            groups[-1].slots.append(slot)
        else:
            groups.append(group)
    lines: list[str] = []
    for group in groups:
        is_last = group is groups[-1]
        lines.append(("└── " if is_last else "├── ") + _group_line(group))
        lines.extend(("    " if is_last else "│   ") + line for line in group.lines)
    return lines


def _group_line(group: _Group) -> str:
    first, last, description = group.slots[0], group.slots[-1], _describe(group.module)
    is_named_by_class = first == type(group.module).__name__
    counted = _counted(group.parameter_count)
    if len(group.slots) > 1:
        each = [f"{count} each" for count in counted]
        return ", ".join([f"{len(group.slots)} x {description} ({first} … {last})", *each])
    return ", ".join([description if is_named_by_class else f"{first}: {description}", *counted])


def _describe(module: nn.Module) -> str:
    mark = "<+> " if getattr(module, "is_adapter", False) else ""
    return f"{mark}{type(module).__name__}({module.extra_repr()})".replace("\n", " ")


def _counted(count: int) -> list[str]:
    return [f"{readable_count(count)} parameters"] if count else []


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def readable_count(count: int) -> str:
    """A count in three digits or so.

    >>> readable_count(999), readable_count(1_234), readable_count(859_520_964)
    ('999', '1.23k', '860M')
    """
    value = float(count)
    for unit in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


# -- locating errors


def add_location(root: nn.Module) -> None:
    """Add a note to the error that is being handled: the way to the layer that failed, its inputs, what does not fit.

    root: where the way starts. The note replaces that of an inner call, so an error carries one note, of its whole way.
    """
    error = sys.exception()
    if error is None:  # torch's compiler goes on behind a broken graph without it
        return
    calls = list(_calls(error.__traceback__))
    if not calls:
        return
    path = _path([module for module, _ in calls])
    failing, inputs = calls[-1]
    note = f"{NOTE_START}{' > '.join(path)}, called with ({', '.join(map(describe_value, inputs))})"
    misfit = _misfit(failing, inputs)
    notes = [text for text in getattr(error, "__notes__", []) if not text.startswith(NOTE_START)]
    error.__notes__ = [*notes, f"{note}: {misfit}" if misfit else note]


def _calls(trace: TracebackType | None) -> Iterator[tuple[nn.Module, tuple[Any, ...]]]:
    """The module calls that a traceback went through, outermost first, with their inputs."""
    last: nn.Module | None = None
    while trace is not None:
        # `_call_impl` is how torch calls a module, `__call__` how ours do; with hooks, both are on the way
        if trace.tb_frame.f_code.co_name in ("_call_impl", "__call__"):
            variables = trace.tb_frame.f_locals
            module = variables.get("self")
            if isinstance(module, nn.Module) and module is not last:
                yield module, variables.get("args", ())
                last = module
        trace = trace.tb_next


def _path(modules: list[nn.Module]) -> list[str]:
    names = [type(modules[0]).__name__]
    for above, below in itertools.pairwise(modules):
        names.append(_slot(above, below) or type(below).__name__)
    return names


def _slot(above: nn.Module, below: nn.Module) -> str | None:
    modules = cast("Iterator[tuple[str, nn.Module]]", above.named_modules())
    return next((name for name, child in modules if child is below), None)


def describe_value(value: Any) -> str:
    """A tensor by shape and dtype (and device, if not the CPU), anything else by its class.

    >>> describe_value(Tensor(2, 3)), describe_value(1.5), describe_value([Tensor(1)])
    ('(2, 3) float32', 'float', 'list[(1,) float32]')
    """
    if isinstance(value, Tensor):
        place = "" if value.device.type == "cpu" else f" {value.device}"
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}{place}"
    if type(value) in (list, tuple) and value:
        return f"{type(value).__name__}[{', '.join(map(describe_value, value))}]"
    return type(value).__name__


def _misfit(module: nn.Module, inputs: tuple[Any, ...]) -> str | None:
    """What does not fit between a layer and its first input, in words, where it is cheap to know."""
    x = next((value for value in inputs if isinstance(value, Tensor)), None)
    weight = next(module.parameters(), None)
    if x is None:
        return None
    spatial = getattr(module, "kernel_size", None)
    channels = 0 if isinstance(spatial, tuple) and x.ndim == len(cast("tuple[int, ...]", spatial)) + 1 else 1
    where = (("in_features", -1, "last dimension"), ("in_channels", channels, f"channels (dimension {channels})"))
    for attribute, dim, noun in where:
        expected = getattr(module, attribute, None)
        if isinstance(expected, int) and x.ndim > max(dim, 0) and expected != x.shape[dim]:
            return f"{type(module).__name__} expects {noun} of size {expected}, but got {x.shape[dim]}"
    if weight is None:
        return None
    if weight.device != x.device:
        return f"the weights are on {weight.device}, the input is on {x.device}"
    if x.is_floating_point() and weight.dtype != x.dtype:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (weight.dtype, x.dtype)]
        return f"the weights are {dtypes[0]}, the input is {dtypes[1]}"
    return None
