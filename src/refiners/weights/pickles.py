"""What the pickle of a torch file would do, found out without doing it.

A pickle is a program for a stack machine. torch runs no code of a file if it is told to read only weights. Still, such
a program can call much that files of tensors have no use for, and ask for work without end: tuples of the same tuple,
a few bytes each, double what there is to hash, and deep ones overflow the stack.
"""

import io
import pickletools
from pathlib import Path

from refiners.weights.header import DTYPES

MAX_PICKLE_BYTES = 10_000_000  # a thousand tensors take about 100,000
_MAX_TUPLE = 1000  # things in a tuple, with those in the tuples in it; a tensor takes about 20
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_GETS, _PUTS = ("BINGET", "LONG_BINGET"), ("BINPUT", "LONG_BINPUT")
_STORAGES = (
    *("Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double"),
    *("ComplexFloat", "ComplexDouble"),
)
_GLOBALS = {
    *("collections.OrderedDict", "torch.Size", "torch.device"),
    *("torch.nn.parameter.Parameter", "torch._utils._rebuild_parameter"),
    *("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"),
    *("torch.storage.UntypedStorage", *(f"torch.{storage}Storage" for storage in _STORAGES)),
    *map(str, DTYPES.values()),
    # what the first code for textual inversion saved its vectors in; read as a dict, see `torch_files`
    *("torch.nn.modules.container.ParameterDict", "__builtin__.set", "builtins.set"),
}


def check_pickles(path: Path | str, content: bytes, count: int) -> None:
    """Check the pickles that `content` starts with: as many as `count`, one after the other.

    Raises ValueError if they call anything but what makes plain tensors, or build endless tuples, or are damaged.
    """
    stream = io.BytesIO(content)
    for _ in range(count):
        try:
            problem = _problem(stream)
        except (ValueError, LookupError) as error:
            raise unreadable(path, f"its pickle is damaged: {error}") from error
        if problem is not None:
            raise ValueError(
                f"{path}: refused, since this file wants {_escaped(problem)} and a file of weights needs none; "
                "ask its author for safetensors, or convert it where you can trust it"
            )


def unreadable(path: Path | str, reason: str) -> ValueError:
    """The error of a file that is no torch file of tensors, or a damaged one."""
    return ValueError(
        f"{path}: this is not a torch file that can be read without running code ({_escaped(reason)}); "
        "it may be damaged: get it again, or ask its author for safetensors"
    )


def _escaped(text: str) -> str:
    """The start of a text that may come from a file, without what would change the look of a terminal."""
    return text[:300].encode("unicode_escape").decode()


def _problem(stream: io.BytesIO) -> str | None:
    """What a program does that it should not. Raises ValueError or LookupError if it is none."""
    stack: list[int] = []  # of each value, how many things it holds, if it is a tuple
    marks: list[int] = []
    memo: dict[object, int] = {}
    for operation, argument, _ in pickletools.genops(stream):
        name = operation.name
        if name == "GLOBAL" and str(argument).replace(" ", ".") not in _GLOBALS:
            return f"to run code ({str(argument).replace(' ', '.')})"
        if name == "MARK":
            marks.append(len(stack))
        elif name in _PUTS:
            memo[argument] = stack[-1]
        elif name in _GETS:
            stack.append(memo[argument])
        else:
            taken = _take(operation, stack, marks)
            size = 1 + sum(taken) if name in _TUPLES else 1
            if size > _MAX_TUPLE:
                return f"a tuple of more than {_MAX_TUPLE} things"
            stack += [size] * len(operation.stack_after)
    return None


def _take(operation: pickletools.OpcodeInfo, stack: list[int], marks: list[int]) -> list[int]:
    """Take from the stack what an operation takes."""
    before = operation.stack_before
    has_mark = pickletools.markobject in before
    start = marks.pop() - before.index(pickletools.markobject) if has_mark else len(stack) - len(before)
    if start < 0:
        raise IndexError("it takes from an empty stack")
    taken = stack[start:]
    del stack[start:]
    return taken
