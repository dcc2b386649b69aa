"""Arithmetic of LoRA files: sums, smaller ranks, other kinds as LoRAs, and LoRAs of what two models differ by."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from refiners.adapters.approximation import Limit
from refiners.adapters.difference import Difference
from refiners.foundationals.latent_diffusion.lora.export import in_dtype
from refiners.foundationals.latent_diffusion.lora.losses import LayerLoss, LoraLosses
from refiners.foundationals.latent_diffusion.lora.places import Layer, Patchable, find_deltas, find_layers
from refiners.foundationals.latent_diffusion.lora.reduction import Outcome, reduced, weighted_delta
from refiners.foundationals.latent_diffusion.lora.weights import LoraWeights
from refiners.weights.lora_keys import Kind, LoraFormat, LoraUpdate, check_format, save_updates

Weighted = tuple[LoraUpdate, float]


def combine_loras(
    sources: Mapping[str, float] | Mapping[Path, float],
    target: Path | str,
    model: Patchable,
    rank: int | None = None,
    format: str = "kohya",
    dtype: torch.dtype | None = None,
) -> LoraLosses:
    """Write the weighted sum of LoRA files, {path: weight}, as one file, and say what is lost.

    model: that they are for. Its weights count only for kinds that depend on them, as DoRA and OFT; without those it
        may be on the meta device.
    rank: None for the sum itself, whose ranks are the sums of those of the files. A number for the best LoRA of at most
        this rank, into which all kinds of updates of linear layers and convolutions go.
    format: as in `save_lora`. dtype: None for one that holds those of the files; its rounding is not counted as a loss.
    Full differences of norms, embeddings and biases are summed as they are.
    Raises ValueError if a file does not fit the model, a kind of update needs a rank, or the format cannot hold it.
    """
    form, limit = check_format(format), None if rank is None else Limit(rank)
    return _write(target, _reduced(_read(sources, model), find_layers(model), limit, dtype), form)


def resize_lora(
    source: Path | str,
    target: Path | str,
    model: Patchable,
    rank: int | None = None,
    energy: float | None = None,
    format: str = "kohya",
    dtype: torch.dtype | None = None,
) -> LoraLosses:
    """Write a LoRA file with the best LoRAs of smaller ranks, and say what is lost. Other kinds stay as they are.

    rank, energy: the most, and how much to keep, see `refiners.adapters.approximation.Limit`; with an energy, each
        layer has a rank of its own.
    model, format, dtype: as in `combine_loras`. Raises as that, and ValueError if there is no LoRA in the file.
    """
    form, limit = check_format(format), Limit(rank, energy)
    updates = _read({str(source): 1.0}, model)
    plain = [(update, weight) for update, weight in updates if _is_plain(update)]
    if not plain:
        raise ValueError(f"{source}: there is no plain LoRA in this file whose rank could be changed: use to_lora")
    kept = [_kept(in_dtype(update, dtype)) for update, _ in updates if not _is_plain(update)]
    return _write(target, [*_reduced(plain, find_layers(model), limit, dtype), *kept], form)


def to_lora(
    source: Path | str,
    target: Path | str,
    model: Patchable,
    rank: int | None = None,
    energy: float | None = None,
    format: str = "kohya",
    dtype: torch.dtype | None = None,
) -> LoraLosses:
    """Write the updates of a file, whatever their kinds, as the LoRAs that come nearest, and say what is lost.

    Those of norms, embeddings and biases stay full differences. The rest is as in `resize_lora`.
    """
    form, limit = check_format(format), Limit(rank, energy)
    return _write(target, _reduced(_read({str(source): 1.0}, model), find_layers(model), limit, dtype), form)


def extract_lora(
    tuned: Patchable,
    base: Patchable,
    target: Path | str,
    rank: int | None = None,
    energy: float | None = None,
    is_complete: bool = True,
    format: str = "kohya",
    dtype: torch.dtype | None = None,
) -> LoraLosses:
    """Write what the UNet and text encoder of a tuned model have more than those of its base, and say what is lost.

    is_complete: whether changes of norms, embeddings and biases, for which there are no LoRAs, are written as full
        differences, which kohya's format alone holds; without, they are lost, as the losses then say.
    dtype: None for that of the tuned weights. rank, energy, format: as in `resize_lora`.
    Raises ValueError if the models have other shapes, equal weights, or updates on them.
    """
    form, limit = check_format(format), Limit(rank, energy)
    ours, theirs = find_layers(tuned), find_layers(base)
    for model, layers in ((tuned, ours), (base, theirs)):
        if next(find_deltas(model, layers), None) is not None:
            raise ValueError("a model to compare has weight updates on it: take them off, or merge them, first")
    outcomes = [
        outcome if is_complete else _without_difference(outcome)
        for layer, delta in _changes(ours, theirs)
        for outcome in reduced(layer, [delta], limit, dtype or cast(Tensor, layer.module.weight).dtype)
    ]
    if not outcomes:
        raise ValueError("the two models have equal weights, so there is nothing to extract")
    return _write(target, outcomes, form)


def _read(sources: Mapping[str, float] | Mapping[Path, float], model: Patchable) -> list[Weighted]:
    if not sources:
        raise ValueError("there are no LoRA files to sum: name at least one")
    return [
        (each, weight) for source, weight in sources.items() for each in LoraWeights(source).read_for(model).updates
    ]


def _reduced(
    updates: Sequence[Weighted], layers: Mapping[str, Layer], limit: Limit | None, dtype: torch.dtype | None
) -> Iterator[Outcome]:
    """Each layer's updates as one LoRA, in the order of the model."""
    by_path: dict[str, list[Weighted]] = {}
    for update, weight in updates:
        by_path.setdefault(update.place.path, []).append((update, weight))
    for path, layer in layers.items():
        members = by_path.get(path, [])
        if members:
            deltas = [weighted_delta(layer, update, weight) for update, weight in members]
            yield from reduced(layer, deltas, limit, dtype or _holding([update for update, _ in members]))


def _holding(updates: Iterable[LoraUpdate]) -> torch.dtype:
    """A number format that holds those of some updates; those of one byte, which sums would not fit, become float16."""
    dtypes = [tensor.dtype for update in updates for tensor in update.tensors.values() if tensor.is_floating_point()]
    return reduce(torch.promote_types, [torch.float16 if dtype.itemsize == 1 else dtype for dtype in dtypes])


def _is_plain(update: LoraUpdate) -> bool:
    return update.shown_kind in (Kind.LORA, Kind.EMBEDDING)


def _kept(update: LoraUpdate) -> Outcome:
    """An update as it is."""
    return update, LayerLoss(update.place.path, update.shown_kind, update.rank, 0.0)


def _without_difference(outcome: Outcome) -> Outcome:
    _, loss = outcome
    return outcome if loss.kind is Kind.LORA else (None, replace(loss, lost=loss.norm))


def _changes(ours: Mapping[str, Layer], theirs: Mapping[str, Layer]) -> Iterator[tuple[Layer, Difference]]:
    """What is to be added to the layers of the second model to make them those of the first."""
    if ours.keys() != theirs.keys():
        path = min(ours.keys() ^ theirs.keys())
        raise ValueError(f"only one of the two models has {path}: compare two of the same architecture")
    for path, layer in ours.items():
        other = theirs[path]
        if layer.place.shape != other.place.shape:
            raise ValueError(f"{path} has shape {layer.place.shape} in one model, {other.place.shape} in the other")
        weight, bias = (_change(layer.module, other.module, name) for name in ("weight", "bias"))
        if weight is not None or bias is not None:
            yield layer, Difference(path, weight, bias)


def _change(tuned: nn.Module, base: nn.Module, name: str) -> Tensor | None:
    ours, theirs = tuned._parameters.get(name), base._parameters.get(name)
    if ours is None and theirs is None:
        return None
    change = (0.0 if ours is None else ours.detach().float()) - (0.0 if theirs is None else theirs.detach().float())
    assert isinstance(change, Tensor), "one of them is there"
    return change if change.any() else None


def _write(target: Path | str, outcomes: Iterable[Outcome], form: LoraFormat) -> LoraLosses:
    outcomes = list(outcomes)
    save_updates(target, [update for update, _ in outcomes if update is not None], form)
    return LoraLosses(Path(target), tuple(loss for _, loss in outcomes))
