"""Layers without weights that pass on, pick, or compute from their inputs by a function of the user."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from refiners.fluxion.layers.chain import ContextModule
from refiners.fluxion.layers.module import Module, single_output


@single_output
class Identity(Module):
    """Returns its input."""

    def forward(self, x: Any) -> Any:
        return x


class GetArg(Module):
    """Returns one of its inputs, by index. Raises IndexError if there are not so many."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, *args: Any) -> Any:
        if not -len(args) <= self.index < len(args):
            raise IndexError(f"GetArg({self.index}) got only {len(args)} inputs")
        return args[self.index]

    def extra_repr(self) -> str:
        return str(self.index)


class Lambda(Module):
    """Calls a function with its inputs. A model with a `lambda` runs and copies, but cannot be pickled."""

    def __init__(self, func: Callable[..., Any]) -> None:
        super().__init__()
        self.func = func

    def forward(self, *args: Any) -> Any:
        return self.func(*args)

    def extra_repr(self) -> str:
        name = getattr(self.func, "__name__", type(self.func).__name__)
        try:
            return f"{name}{inspect.signature(self.func)}"
        except (TypeError, ValueError):  # some built-in functions have no signature
            return name


class Converter(ContextModule):
    """Moves its inputs to the device and dtype of the chain it sits in; integers and booleans keep their dtype."""

    def __init__(self, set_device: bool = True, set_dtype: bool = True) -> None:
        super().__init__()
        self.set_device = set_device
        self.set_dtype = set_dtype

    def forward(self, *inputs: Tensor) -> Any:
        parent = self.ensure_parent
        device = parent.device if self.set_device else None
        dtype = parent.dtype if self.set_dtype else None
        outputs = tuple([x.to(device=device, dtype=dtype if x.is_floating_point() else None) for x in inputs])
        return outputs[0] if len(outputs) == 1 else outputs

    def extra_repr(self) -> str:
        return f"set_device={self.set_device}, set_dtype={self.set_dtype}"


class Breakpoint(Module):
    """Stops in the debugger (`breakpoint()`, so PYTHONBREAKPOINT chooses which) and passes its inputs on."""

    def forward(self, *args: Any) -> Any:
        breakpoint()
        return args[0] if len(args) == 1 else args
