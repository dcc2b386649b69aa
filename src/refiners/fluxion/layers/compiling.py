"""What `torch.compile` needs of a chain.

The compiler keeps what it compiled with the code object of the function it entered by, and allows few versions of it
(`torch._dynamo.config.recompile_limit`, 8). All chains run by the same few functions, so that without further ado the
ninth chain that a process compiles would be refused. So each chain brings an entry with a code object of its own.
"""

from collections.abc import Callable
from typing import Any, cast
from weakref import ref

from torch import nn


def own_entry(module: nn.Module) -> Callable[..., Any]:
    """A function that calls `module`, with a code object that no other function has.

    As the attribute `__call__` of the module itself it is what `torch.compile(module)` enters by; `module(x)` does not
    use it: Python looks for `__call__` in the class.
    """
    owner = ref(module)  # strong, it would keep what is ejected until the next garbage collection

    def call(*args: Any, **kwargs: Any) -> Any:
        module = owner()
        return type(module).__call__(module, *args, **kwargs)

    return _with_own_code(call)


def own_forward_entry(module: nn.Module) -> Callable[..., Any]:
    """The same for `module.compile()`, which compiles the hooks and `forward` below `module(x)`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return cast(Any, module)._call_impl(*args, **kwargs)

    return _with_own_code(call)


def _with_own_code(function: Any) -> Callable[..., Any]:
    function.__code__ = function.__code__.replace()
    return function
