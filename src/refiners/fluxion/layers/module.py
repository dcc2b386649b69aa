"""What every node of a tree is (`Module`), leaves that hold a weight (`WeightedModule`), and the end of a chain."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from refiners.fluxion import tree
from refiners.weights.files import read_safetensors

ModuleType = TypeVar("ModuleType", bound=type[nn.Module])

# Classes whose `forward` returns one value. Of torch's own, those that people put into chains most.
_SINGLE_OUTPUT: set[type[nn.Module]] = {
    *(nn.Identity, nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d),
    *(nn.ReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Dropout, nn.Flatten),
}


def single_output(cls: ModuleType) -> ModuleType:
    """Declare that `forward` of exactly this class returns one value, never a tuple to be spread over the next layer.

    A promise for speed only: a chain of such layers runs without looking at what they return.
    """
    _SINGLE_OUTPUT.add(cls)
    return cls


def has_single_output(module: nn.Module) -> bool:
    """Whether the class of `module` (not one of its bases) was declared with `single_output`."""
    return type(module) in _SINGLE_OUTPUT


class Module(nn.Module):
    """A node of a tree: a `torch.nn.Module` that knows how to be shared, loaded and found."""

    forward: Callable[..., Any]

    _contexts: Any = None  # what `_end_call` drops; only chains have any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `forward` and the hooks, as torch does, but with fewer Python frames where there are no hooks.

        An error keeps its type, and gets a note that says where in the tree it happened.
        """
        try:
            if (
                self._forward_hooks
                or self._forward_pre_hooks
                or self._backward_hooks
                or self._backward_pre_hooks
                or torch_module._global_forward_hooks
                or torch_module._global_forward_pre_hooks
                or torch_module._global_backward_hooks
                or torch_module._global_backward_pre_hooks
                or self._compiled_call_impl is not None
            ):
                return super().__call__(*args, **kwargs)
            return self.forward(*args, **kwargs)
        except Exception:  # without a name: before Python 3.13 a frame that was looked into keeps what it knew by name
            if not torch.compiler.is_compiling():  # the compiler reports where it was itself
                tree.add_location(self)
            raise
        finally:
            if self._contexts is not None:
                self._end_call()

    def _end_call(self) -> None:
        """Called after a call, whether it returned or raised, if there are contexts."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def structural_copy(self) -> Self:
        """Return what stands for this node in a structural copy of its tree: a leaf is shared, so itself."""
        return self

    def _copied_from(self, source: Any) -> None:
        """Called on a structural copy when its children are in place; `source` is what it was copied from."""

    def _restored(self) -> None:
        """Called when a deep copy or an unpickled module has its children in place."""

    def get_submodule(self, target: str) -> nn.Module:
        """As in torch, and as `named_modules` has it: the name of what is adapted stays that of what is adapted.

        What sits in the slot, the adapter, is `chain.Linear`, or `Linear.LoraAdapter` by name.
        Raises AttributeError if there is no such name.
        """
        found: Any = super().get_submodule(target)
        is_meant = not target or not getattr(found, "is_adapter", False) or found._name == target.rpartition(".")[2]
        return found if is_meant else found.base

    def load_from_safetensors(self, tensors_path: Path | str, strict: bool = True) -> Self:
        """Load a `.safetensors` file into this module and return the module.

        Raises ValueError for a broken file, RuntimeError for keys or shapes that do not fit (`strict`).
        """
        self.load_state_dict(read_safetensors(tensors_path), strict=strict)
        return self


class WeightedModule(Module):
    """A leaf with a `weight`, which also tells its device and dtype."""

    weight: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the weight."""
        return self.weight.dtype


class Return(Module):
    """Ends the chain it sits in: the chain returns what came so far, and what stands behind is not called.

    What stands behind still belongs to the tree: an adapter keeps a target there that it does not run.
    """

    def forward(self, *args: Any) -> Any:
        return args[0] if len(args) == 1 else args


def shell_copy(module: nn.Module) -> Any:
    """Copy one node, not what it holds: same parameters, buffers, children and values in containers of its own."""
    clone = object.__new__(type(module))
    for name, value in module.__dict__.items():
        clone.__dict__[name] = value.copy() if isinstance(value, dict | list | set) else value
    for bound_to_original in ("_compiled_call_impl", "__call__"):
        clone.__dict__.pop(bound_to_original, None)
    return clone
