"""LoRAs out of a model, into files of the formats of others; and from one format to another."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from refiners.adapters.conv2d_lora import Conv2dLora
from refiners.adapters.delta import Delta, RankedDelta
from refiners.adapters.deltas import kind_of_parts
from refiners.adapters.difference import Replacement
from refiners.adapters.orthogonal import InputBoft, InputOft
from refiners.foundationals.latent_diffusion.lora.places import Layer, Patchable, find_deltas, find_layers
from refiners.foundationals.latent_diffusion.lora.weights import LoraWeights, file_name
from refiners.weights.lora_keys import (
    Kind,
    LoraUpdate,
    Place,
    check_finite,
    check_format,
    format_updates,
    save_updates,
)


def export_lora(
    model: Patchable, name: str | None = None, format: str = "kohya", dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file with the LoRA of a name, on all layers that have it.

    name: None for the only one. format: "kohya", "diffusers" or "peft". dtype: None for what they have in the model.
    The alpha of each layer is in the file; the scale that it is used with now is not.
    Raises ValueError if the model has no such LoRA, or one that the format cannot hold.
    """
    return format_updates(_collect(model, name, dtype), check_format(format))


def save_lora(
    path: Path | str,
    model: Patchable,
    name: str | None = None,
    format: str = "kohya",
    dtype: torch.dtype | None = None,
) -> None:
    """Write the file that `export_lora` tells of; for peft a folder, with one in it for each of several trees.

    Raises as `export_lora`, and FileNotFoundError if the folder to write to does not exist.
    """
    form = check_format(format)
    save_updates(path, _collect(model, name, dtype), form)


def convert_lora(
    source: Path | str,
    target: Path | str,
    model: Patchable,
    format: str = "kohya",
    dtype: torch.dtype | None = None,
    strict: bool = True,
) -> int:
    """Write a LoRA file in another format, and return of how many layers. Updates stay what they are, bit by bit.

    model: that it is for; its weights are not used, so it may be on the meta device.
    dtype: None for that of the file.
    strict: whether a key without a place in the model is an error; otherwise it is left out.
    Raises ValueError if not all of the file can be used with the model, or if values leave the range of `dtype`.
    """
    form = check_format(format)
    updates = [in_dtype(update, dtype) for update in LoraWeights(source).read_for(model, strict).updates]
    save_updates(target, updates, form)
    return len(updates)


def in_dtype(update: LoraUpdate, dtype: torch.dtype | None) -> LoraUpdate:
    """An update with its tensors in a dtype; None for their own. Raises ValueError if values leave its range."""
    if dtype is None:
        return update
    cast = {part: tensor.to(dtype) for part, tensor in update.tensors.items()}
    check_finite((f"in {dtype} the {part} of {update.name!r}", tensor) for part, tensor in cast.items())
    return replace(update, tensors=cast)


def _collect(model: Patchable, name: str | None, dtype: torch.dtype | None) -> list[LoraUpdate]:
    found = list(find_deltas(model, find_layers(model)))
    names = sorted({file_name(delta.name) for _, delta in found})
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        there = f"there are: {', '.join(names)}" if names else "there is none at all"
        raise ValueError(f"no LoRA {name!r} on this model; {there}" if name else f"say the name of a LoRA; {there}")
    updates: dict[tuple[str, str], LoraUpdate] = {}
    for layer, delta in found:
        if file_name(delta.name) == name:
            update = _update(layer, delta, dtype)
            if updates.setdefault((update.place.path, delta.name), update) is not update:
                raise ValueError(f"there are two LoRAs {name!r} on {update.place.path}: no file can hold both")
    return list(updates.values())


def _update(layer: Layer | None, delta: Delta, dtype: torch.dtype | None) -> LoraUpdate:
    if layer is None:
        raise ValueError(f"LoRA {delta.name!r} is on a layer that is no part of the model itself: no format names it")
    kind, parts, place = kind_of_parts(delta), delta.parts(), layer.place
    if isinstance(delta, Replacement):  # no format has whole weights
        kind, parts = Kind.DIFFERENCE, _difference(delta, layer)
    if kind is Kind.DIFFERENCE and place.layer == "norm":
        kind = Kind.NORM
    if isinstance(delta, Conv2dLora) and delta.mid is None:
        _check_geometry(delta, place)
    ranked = delta if isinstance(delta, RankedDelta) else getattr(delta, "inner", None)
    alpha, rank = (ranked.alpha.item(), ranked.rank) if isinstance(ranked, RankedDelta) else (None, None)
    if isinstance(delta, InputOft | InputBoft):
        alpha = None  # these have none in peft, and nobody else has them
    return in_dtype(LoraUpdate(place, place.path, kind, parts, alpha, rank), dtype)


@torch.no_grad()
def _difference(delta: Replacement, layer: Layer) -> dict[str, Tensor]:
    weight, bias = cast(Tensor, layer.module.weight), cast("Tensor | None", getattr(layer.module, "bias", None))
    found = {"weight": delta.direction(weight), "bias": delta.bias_direction(weight, bias)}
    return {part: tensor for part, tensor in found.items() if tensor is not None}


def _check_geometry(lora: Conv2dLora, place: Place) -> None:
    down, up = lora.down.weight, lora.up.weight
    if down.shape[1:] != place.shape[1:] or any(size != 1 for size in up.shape[2:]):
        raise ValueError(
            f"LoRA {lora.name!r} on {place.path} has kernels {tuple(down.shape[2:])} and {tuple(up.shape[2:])}, but "
            f"files hold only those with the layer's, {place.shape[2:]}, on the way down and (1, 1) on the way up"
        )
