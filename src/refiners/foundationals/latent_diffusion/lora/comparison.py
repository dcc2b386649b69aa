"""Whether two files of weight updates do the same to a model, layer by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from refiners.adapters.approximation import frobenius_norm
from refiners.foundationals.latent_diffusion.lora.places import Layer, Patchable, find_layers
from refiners.foundationals.latent_diffusion.lora.reduction import base_of, has_weight, sum_of, weighted_delta
from refiners.foundationals.latent_diffusion.lora.weights import LoraWeights
from refiners.weights.lora_keys import Kind, LoraUpdate


@dataclass(frozen=True)
class LayerDifference:
    """How far two files are apart on one layer.

    error: the Frobenius norm of the difference of the updates, relative to that of the first; infinite if only the
        second file has one. It is 0 if all tensors are equal bit by bit.
    """

    path: str
    is_equal: bool
    error: float


@dataclass(frozen=True)
class LoraComparison:
    """How far two files are apart; its text is a summary."""

    layers: tuple[LayerDifference, ...]

    @property
    def equal_count(self) -> int:
        """How many layers are equal bit by bit."""
        return sum(layer.is_equal for layer in self.layers)

    @property
    def error(self) -> float:
        """The greatest of the layers."""
        return max((layer.error for layer in self.layers), default=0.0)

    def __str__(self) -> str:
        text = f"{self.equal_count} of {len(self.layers)} layers are equal bit by bit"
        if self.equal_count == len(self.layers):
            return text
        worst = max(self.layers, key=lambda layer: layer.error)
        return f"{text}, the others differ by up to {worst.error:.1e} of the update ({worst.path})"


def compare_loras(first: Path | str, second: Path | str, model: Patchable, strict: bool = True) -> LoraComparison:
    """Compare what two files do to each layer of a model.

    model: that they are for. If it is on the meta device, updates that depend on its weights and are not equal bit by
        bit are compared tensor by tensor.
    strict: whether a key without a place in the model is an error.
    Raises ValueError if a file does not fit the model.
    """
    layers = find_layers(model)
    ours, theirs = (_by_path(path, model, strict) for path in (first, second))
    paths = [path for path in layers if path in ours or path in theirs]
    return LoraComparison(tuple(_compared(layers[path], ours.get(path, []), theirs.get(path, [])) for path in paths))


def _by_path(path: Path | str, model: Patchable, strict: bool) -> dict[str, list[LoraUpdate]]:
    found: dict[str, list[LoraUpdate]] = {}
    for update in LoraWeights(path).read_for(model, strict).updates:
        found.setdefault(update.place.path, []).append(update)
    return found


def _compared(layer: Layer, ours: Sequence[LoraUpdate], theirs: Sequence[LoraUpdate]) -> LayerDifference:
    path = layer.place.path
    if len(ours) == len(theirs) and all(map(_is_same, ours, theirs)):
        return LayerDifference(path, True, 0.0)
    try:
        mine, other = (_changes(layer, updates) for updates in (ours, theirs))
    except ValueError:  # without the weights of the model, the tensors tell
        mine, other = (_tensors(updates) for updates in (ours, theirs))
    return LayerDifference(path, False, _relative(mine, other))


def _is_same(one: LoraUpdate, other: LoraUpdate) -> bool:
    of_both = [(each.kind, each.tensors.keys(), _alpha_that_counts(each)) for each in (one, other)]
    if of_both[0] != of_both[1]:
        return False
    pairs = [(tensor, other.tensors[part]) for part, tensor in one.tensors.items()]
    return all(mine.dtype == theirs.dtype and torch.equal(mine, theirs) for mine, theirs in pairs)


def _alpha_that_counts(update: LoraUpdate) -> float:
    """The strength; of OFT, the limit. A LoKr without low-rank factors may have an alpha, but no strength."""
    return update.alpha or 0.0 if update.kind is Kind.OFT else update.strength


@torch.no_grad()
def _changes(layer: Layer, updates: Sequence[LoraUpdate]) -> dict[str, Tensor]:
    """What updates add to the weight and to the bias of a layer."""
    deltas = [weighted_delta(layer, update) for update in updates]
    weight, bias = base_of(layer, deltas)
    found = {
        "weight": sum_of([delta.delta_weight(weight) for delta in deltas if has_weight(delta)]),
        "bias": sum_of([delta.delta_bias(weight, bias) for delta in deltas]),
    }
    return {part: tensor for part, tensor in found.items() if tensor is not None}


def _tensors(updates: Sequence[LoraUpdate]) -> dict[str, Tensor]:
    return {
        f"{update.kind} {part}": tensor
        for update in updates
        for part, tensor in {**update.tensors, "strength": torch.tensor(update.strength)}.items()
    }


def _relative(mine: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    worst = 0.0
    for part in {**mine, **other}:
        ours, theirs = mine.get(part), other.get(part)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            return float("inf")
        lost, norm = frobenius_norm(ours.double() - theirs.double()), frobenius_norm(ours.double())
        worst = max(worst, lost / norm if norm else float("inf") if lost else 0.0)
    return worst
