"""Gradient checkpointing (arXiv 1604.06174): activations are dropped after a forward pass and computed once more."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.utils import checkpoint

from refiners.fluxion.context import Contexts
from refiners.fluxion.layers.chain import Chain, ContextModule


class Recomputed(Chain):
    """Run the children as a chain; for the backward pass keep only the inputs, and run it a second time there.

    Contexts are gone when the backward pass comes, so what they hold on entry is kept with the inputs. Lists, dicts and
    sets in them are kept as copies: the second run pops and pushes on those, and nobody sees it.
    """

    def forward(self, *inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*inputs)
        root, forward = self.root, super().forward
        kept, is_complete, is_first = _copied(root._contexts), _has_initial_contexts(root), True

        def run(*inputs: Any) -> Any:
            nonlocal is_first
            if is_first:
                is_first = False
                return forward(*inputs)
            with _contexts_of(root, _copied(kept), is_complete):
                return forward(*inputs)

        return cast("Any", checkpoint).checkpoint(run, *inputs, use_reentrant=False)


@contextmanager
def _contexts_of(root: ContextModule, contexts: Contexts | None, is_complete: bool) -> Generator[None]:
    """Let the tree below `root` see these contexts; is_complete: with those that every call starts with."""
    before = root._contexts, _has_initial_contexts(root)
    root.__dict__.update(_contexts=contexts, _has_initial_contexts=is_complete)
    try:
        yield
    finally:
        root.__dict__.update(_contexts=before[0], _has_initial_contexts=before[1])


def _has_initial_contexts(root: ContextModule) -> bool:
    return isinstance(root, Chain) and root._has_initial_contexts


def _copied(contexts: Contexts | None) -> Contexts | None:
    """Copies of the contexts and of the containers in them, not of the tensors."""
    if contexts is None:
        return None
    return {name: {key: _copied_value(value) for key, value in context.items()} for name, context in contexts.items()}


def _copied_value(value: object) -> object:
    return cast("Any", value).copy() if type(value) in (list, dict, set) else value
