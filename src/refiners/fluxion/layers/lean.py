"""Steps of a forward pass that keep less for the backward pass than torch's own, with the same outputs and gradients.

torch keeps the input of a convolution even where its weights do not train, and all that a gated unit has in between.
Whatever runs without gradients inside these also has the faster kernels that know none.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

Run = Callable[[Tensor], Tensor]
RunBack = Callable[[Tensor, Tensor, torch.Size], Tensor]


def can_run_frozen(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a layer is on the way of a gradient to `x`, and none goes to its own weights."""
    return (
        torch.is_grad_enabled()
        and x.__class__ is Tensor
        and x.requires_grad
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and not torch.compiler.is_compiling()
    )


def run_frozen(x: Tensor, weight: Tensor, run: Run, run_back: RunBack) -> Tensor:
    """`run(x)`, of which nothing but the weight, which is there anyway, is kept.

    run_back: the gradient of the input, from that of the output, the weight, and the size of the input.
    """
    return cast(Tensor, _Frozen.apply(x, weight, run, run_back))


def gelu_gated(x: Tensor, approximate: str) -> Tensor:
    """The first half of the last dimension times GELU of the second (GEGLU, arXiv 2002.05202); only `x` is kept."""
    return cast(Tensor, _GeluGated.apply(x, approximate))


class _Frozen(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, run: Run, run_back: RunBack) -> Tensor:
        return run(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, run_back = inputs
        ctx.save_for_backward(weight)
        ctx.size, ctx.dtype, ctx.run_back = x.shape, x.dtype, run_back

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        # under autocast the output is of another precision than the input
        back = ctx.run_back(gradient, weight.to(gradient.dtype), ctx.size)
        return back.to(ctx.dtype), None, None, None


class _GeluGated(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, approximate: str) -> Tensor:
        output, gate = x.chunk(2, dim=-1)
        return output * torch.nn.functional.gelu(gate, approximate=approximate)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.approximate = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,), (x,) = gradients, ctx.saved_tensors
        output, gate = x.chunk(2, dim=-1)
        through_output = gradient * torch.nn.functional.gelu(gate, approximate=ctx.approximate)
        through_gate = torch.ops.aten.gelu_backward(gradient * output, gate, approximate=ctx.approximate)
        return torch.cat([through_output, through_gate], dim=-1), None
