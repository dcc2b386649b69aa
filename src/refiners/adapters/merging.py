"""Merging: writes weight updates into the weights, where they cost nothing, and takes them out again exactly."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refiners.adapters.delta import Delta
from refiners.adapters.delta_adapter import DeltaAdapter
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.transaction import record, transaction


@dataclass(frozen=True)
class _Change:
    """A tensor of a layer before and after."""

    layer: nn.Module
    name: str
    before: Tensor | None
    after: Tensor
    fingerprint: object  # of `after`, which may be changed in place


class Merged:
    """Updates that were merged. The tensors as they were are kept, so it takes the memory of the layers once more."""

    def __init__(self, adapters: list[tuple[DeltaAdapter, Chain | None]], changes: list[_Change]) -> None:
        self._adapters = adapters
        self._changes = changes

    @property
    def is_merged(self) -> bool:
        """Whether the updates are in the weights now."""
        return bool(self._adapters)

    def unmerge(self) -> None:
        """Give the layers the very tensors that they had before, and inject the adapters again.

        Raises RuntimeError if it was done already, or if a tensor was changed since, as by training or by another merge
        that has to be undone first; nothing is touched then.
        """
        if not self._adapters:
            raise RuntimeError("these updates are not merged, so they cannot be unmerged")
        for change in self._changes:
            now = _tensor_of(change.layer, change.name)
            if now is None or _fingerprint(now) != change.fingerprint:
                raise RuntimeError(
                    f"the {change.name} of a {type(change.layer).__name__} has changed since it was merged: undo later "
                    "merges first, latest first; what was trained or loaded over a merge cannot be told from it"
                )
        with transaction():
            for change in self._changes:
                _put(change.layer, change.name, change.before)
            for adapter, parent in self._adapters:
                adapter.inject(parent)
        self._adapters = []
        self._changes = []


def merge(adapters: Iterable[DeltaAdapter]) -> Merged:
    """Write the updates of injected adapters into the weights of their layers, and eject the adapters.

    It is done whole or not at all. Sums are worked out in float32 and then rounded to the format of the weight. A layer
    that gets an update of its bias and has none gets one. Copies that share the layers share the change.
    Raises ValueError if an update has a scale for each sample, is no update of one weight, or would leave the range of
    the weight's format; RuntimeError if an adapter is not injected.
    """
    chosen = sorted(adapters, key=lambda adapter: len(adapter.get_parents()))  # as they have to be injected again
    by_layer: dict[nn.Module, list[Delta]] = {}
    for adapter in chosen:
        if not adapter._is_injected:
            raise RuntimeError(f"{type(adapter).__name__} is not injected, so it cannot be merged")
        by_layer.setdefault(adapter.base, []).extend(adapter.deltas.values())
    changes = [change for layer, deltas in by_layer.items() for change in _changes(layer, deltas)]
    placed: list[tuple[DeltaAdapter, Chain | None]] = []
    with transaction():
        for adapter in chosen:
            placed.append((adapter, adapter.parent))
            adapter.eject()
        for change in changes:
            _put(change.layer, change.name, change.after)
    return Merged(placed, changes)


@torch.no_grad()
def _changes(layer: nn.Module, deltas: Iterable[Delta]) -> list[_Change]:
    weight, bias = _tensor_of(layer, "weight"), _tensor_of(layer, "bias")
    assert weight is not None, "adapters of updates sit on layers with a weight"
    exact = weight.float()
    new_weight, new_bias = None, None
    for delta in deltas:
        if not delta.is_enabled:
            continue
        single = delta if delta.dtype == torch.float32 else copy.deepcopy(delta).float()
        if single.direction(exact) is not None:
            new_weight = (exact if new_weight is None else new_weight) + single.delta_weight(exact)
        added = single.delta_bias(exact, None if bias is None else bias.float())
        if added is not None:
            start = new_bias if new_bias is not None else (0.0 if bias is None else bias.float())
            new_bias = start + added
    found = (("weight", weight, new_weight), ("bias", bias, new_bias))
    return [_rounded(layer, name, before, new, weight.dtype) for name, before, new in found if new is not None]


def _rounded(layer: nn.Module, name: str, before: Tensor | None, new: Tensor, dtype: torch.dtype) -> _Change:
    after = new.to(dtype)
    if not after.isfinite().all():
        raise ValueError(
            f"merged, the {name} of a {type(layer).__name__} would not be finite in {dtype}: lower the scale, or keep "
            "the update unmerged"
        )
    return _Change(layer, name, before, after, _fingerprint(after))


def _tensor_of(layer: nn.Module, name: str) -> Tensor | None:
    parameter = layer._parameters.get(name)
    return None if parameter is None else parameter.detach()


def _fingerprint(tensor: Tensor) -> object:
    """What tells whether a tensor is still what it was: its form, and the sum of its bits as whole numbers."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size(), torch.int8)
    return (
        tensor.device,
        tensor.dtype,
        tensor.shape,
        int(tensor.detach().contiguous().view(whole).sum(dtype=torch.int64)),
    )


def _put(layer: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Let a parameter hold another tensor, or be there no more. The parameter stays the same object."""
    parameter = layer._parameters.get(name)
    before = None if parameter is None else parameter.data

    def undo() -> None:
        _set(layer, name, before)

    _set(layer, name, tensor)
    record(undo)


def _set(layer: nn.Module, name: str, tensor: Tensor | None) -> None:
    parameter = layer._parameters.get(name)
    if tensor is None or parameter is None:
        layer._parameters[name] = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
    else:
        parameter.data = tensor.detach()
