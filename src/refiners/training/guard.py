"""Where a loss that is NaN or infinite comes from: the first layer whose output is bad while its inputs are good."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


class NonFiniteError(ArithmeticError):
    """The loss or a gradient is NaN or infinite. The weights are those of before the step."""


def find_culprit(models: Mapping[str, nn.Module], compute_loss: Callable[[], Tensor]) -> str:
    """Say in words where the first bad value of a loss arises: a weight, a layer's output, the loss; "" if nowhere.

    compute_loss: as in the step that failed; run once more, with hooks.
    """
    for name, parameter in _parameters(models):
        if not _is_finite(parameter):
            return f"the weight {name} is not finite"
    found: list[str] = []
    with _watched(models, found), torch.no_grad():
        loss = compute_loss()
    if found:
        return f"the first bad layer is {found[0]}"
    if not _is_finite(loss):
        return "every layer's output is finite, so it arises in the loss function itself"
    return ""


def find_bad_gradient(models: Mapping[str, nn.Module]) -> str:
    """Say in words which gradients of a step are bad, of which every loss is in order; "" if none is."""
    bad = [name for name, parameter in _parameters(models) if _has_bad_grad(parameter)]
    if bad:
        return (
            f"the loss is finite, but {len(bad)} gradients are not; the last in the tree, where it began, is {bad[-1]}"
        )
    return ""


def _parameters(models: Mapping[str, nn.Module]) -> Generator[tuple[str, nn.Parameter]]:
    for prefix, model in models.items():
        for name, parameter in model.named_parameters():
            yield f"{prefix}.{name}", parameter


def _has_bad_grad(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and not _is_finite(parameter.grad)


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value.detach()).all())
    if isinstance(value, tuple | list):
        return all(map(_is_finite, cast("list[Any]", value)))
    return True


@contextmanager
def _watched(models: Mapping[str, nn.Module], found: list[str]) -> Generator[None]:
    """Note each innermost module that gives a bad value, in the order in which they run."""
    handles: list[Any] = []
    for prefix, model in models.items():
        for name, module in cast("Iterator[tuple[str, nn.Module]]", model.named_modules()):
            path = f"{prefix}.{name}" if name else prefix
            handles.append(module.register_forward_hook(_make_hook(path, found)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _make_hook(path: str, found: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if not _is_finite(output):
            source = "although its inputs are finite" if _is_finite(inputs) else "and neither are its inputs"
            found.append(f"{path}, a {type(module).__name__}: its output is not finite, {source}")

    return note
