"""Chains that join their children in another way than one after the other."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from refiners.fluxion.layers.chain import Chain


class Residual(Chain):
    """Run the children as a chain and add the input: x + F(x)."""

    def forward(self, *inputs: Any) -> Any:
        if len(inputs) != 1:
            raise ValueError(f"Residual adds its one input to its output, but got {len(inputs)} inputs")
        (x,) = inputs
        if not self._is_straight or x.__class__ is not Tensor:
            return super().forward(x) + x
        h = x
        for layer in self._plan:
            h = layer(h)
        return h + x


class Sum(Chain):
    """Call every child with the same inputs and add the outputs; a child that returns a tuple adds all its values."""

    def forward(self, *inputs: Any) -> Any:
        plan = self._plan
        if not plan:
            raise ValueError("Sum has no children, so there is nothing to add")
        total = None
        for layer in plan:
            output = layer(*inputs)
            output = output if output.__class__ is Tensor else _added(output)
            total = output if total is None else total + output
        return total


class Parallel(Chain):
    """Call every child with the same inputs and return the tuple of their outputs."""

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        return tuple([layer(*inputs) for layer in self._plan])


class Distribute(Chain):
    """Call each child with the input at its own place and return the tuple of their outputs."""

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        if len(inputs) != len(self._plan):
            raise ValueError(f"Distribute has {len(self._plan)} children, one per input, but got {len(inputs)} inputs")
        return tuple([layer(x) for layer, x in zip(self._plan, inputs, strict=True)])


class Cascade(Chain):
    """Call every child with the output of the one before it, as a chain does, and return the tuple of all outputs."""

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        outputs: list[Any] = []
        x: Any = inputs
        for layer in self._plan:
            x = layer(*x) if isinstance(x, tuple) else layer(x)
            outputs.append(x)
        return tuple(outputs)


class Passthrough(Chain):
    """Run the children as a chain for their effect (on contexts) and return the inputs unchanged."""

    def forward(self, *inputs: Any) -> Any:
        super().forward(*inputs)
        return inputs[0] if len(inputs) == 1 else inputs


class Concatenate(Chain):
    """Call every child with the same inputs and concatenate the outputs along `dim`; None outputs are left out."""

    def __init__(self, *modules: nn.Module, dim: int = 0) -> None:
        super().__init__(*modules)
        self.dim = dim

    def forward(self, *inputs: Any) -> Tensor:
        outputs = [layer(*inputs) for layer in self._plan]
        return torch.cat([output for output in outputs if output is not None], dim=self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Matmul(Chain):
    """Call both children with the same inputs and multiply their outputs: input(x) @ other(x)."""

    def __init__(self, input: nn.Module, other: nn.Module) -> None:
        super().__init__(input, other)

    def forward(self, *inputs: Any) -> Tensor:
        left, right = self._plan
        return torch.matmul(left(*inputs), right(*inputs))


def _added(output: Any) -> Any:
    if not isinstance(output, tuple):
        return output
    first, *others = cast("tuple[Any, ...]", output)
    return sum(others, start=first)
