"""Layers that read and write contexts: how data reaches deep layers."""

from collections.abc import Callable
from typing import Any, Self

from torch import nn

from refiners.fluxion.context import ContextError
from refiners.fluxion.layers.chain import Chain, ContextModule


class UseContext(ContextModule):
    """Returns a value of a context, whatever the inputs are.

    Raises ContextError (a KeyError) if the value was not set for this call.
    """

    def __init__(self, context: str, key: str) -> None:
        super().__init__()
        self.context = context
        self.key = key
        self.functions: tuple[Callable[[Any], Any], ...] = ()

    def compose(self, func: Callable[[Any], Any]) -> Self:
        """Apply `func` to the value that is read (after those composed before), and return this layer."""
        self.functions = (*self.functions, func)
        return self

    def forward(self, *_: Any) -> Any:
        value: Any
        root: ContextModule = self
        while parent := root._parent:
            root = parent[0]
        try:
            value = root._contexts[self.context][self.key]
        except (KeyError, TypeError):  # not there, or no contexts yet: the slow way, which makes them or explains
            value = self._value_or_error()
        for function in self.functions:
            value = function(value)
        return value

    def _value_or_error(self) -> Any:
        context = self.use_context(self.context)
        if self.key not in context:
            known = ", ".join(map(repr, context)) or "none"
            where = f"context {self.context!r} (set: {known})"
            raise ContextError(f"no key {self.key!r} in {where}: set it before each call")
        return context[self.key]

    def extra_repr(self) -> str:
        return f"context={self.context!r}, key={self.key!r}"


class SetContext(ContextModule):
    """Stores its input in a context and returns it.

    callback: called with the value stored so far (None if there is none) and the input, in place of storing.
    """

    def __init__(self, context: str, key: str, callback: Callable[[Any, Any], Any] | None = None) -> None:
        super().__init__()
        self.context = context
        self.key = key
        self.callback = callback

    def forward(self, x: Any) -> Any:
        context = self.ensure_parent.contexts.setdefault(self.context, {})
        if self.callback is None:
            context[self.key] = x
        else:
            self.callback(context.get(self.key), x)
        return x

    def extra_repr(self) -> str:
        return f"context={self.context!r}, key={self.key!r}"


class SetContextDefault(Chain):
    """Runs the children as a chain and stores the output in a context, unless a value is there; returns the inputs.

    What was made before a call can so be handed in, and is not made again.
    """

    def __init__(self, context: str, key: str, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.context = context
        self.key = key

    def forward(self, *inputs: Any) -> Any:
        context = self.contexts.setdefault(self.context, {})
        if self.key not in context:
            context[self.key] = super().forward(*inputs)
        return inputs[0] if len(inputs) == 1 else inputs

    def extra_repr(self) -> str:
        return f"context={self.context!r}, key={self.key!r}"
