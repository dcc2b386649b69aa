"""LoRA files on a diffusion model: `LoraWeights(path).patch(model)` finds the place of every key by its name.

Formats: kohya's, LyCORIS', diffusers' of all times, peft's, OneTrainer's, ComfyUI's, and those of the first Refiners.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from refiners.adapters.delta import Delta, Scale
from refiners.adapters.delta_adapter import DeltaAdapter
from refiners.adapters.deltas import make_delta
from refiners.adapters.lora import LoraAdapter
from refiners.adapters.low_rank import Lora
from refiners.fluxion.collection import collection_paused
from refiners.fluxion.layers.transaction import transaction
from refiners.foundationals.latent_diffusion.lora.in_order import is_in_order, updates_in_order
from refiners.foundationals.latent_diffusion.lora.places import (
    Layers,
    Patchable,
    family_of,
    find_deltas,
    find_layers,
)
from refiners.foundationals.latent_diffusion.lora.report import AttachedUpdate, LoraReport, attached_update
from refiners.weights.formats import Content, Identity, identify
from refiners.weights.lora_keys import (
    Kind,
    LoraContents,
    LoraFile,
    LoraUpdate,
    check_finite,
    fit_parts,
    is_finite,
    parse_updates,
    read_lora,
    strange_types,
)

_ADVICE = (
    "to leave them out, pass strict=False, or write a file without them: refiners convert IN OUT --to kohya --lenient"
)
_DIFFERENCE = " (difference)"
_COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class LoraWeights:
    """The updates of a LoRA file or adapter folder, to be put onto models and taken off again.

    device, dtype: of the updates in the model; None for those of each layer.
    name: of the updates in the model; None for that of the file, with a number if it is taken.

    Raises ValueError if the file is damaged or holds something else, FileNotFoundError if there is none.
    """

    def __init__(
        self,
        checkpoint_path: Path | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        name: str | None = None,
    ) -> None:
        self.file = read_lora(checkpoint_path)
        self.device = device
        self.dtype = dtype
        self.name = name
        self._adapters: list[DeltaAdapter] = []

    def patch(self, model: Patchable, scale: Scale = 1.0, strict: bool = True) -> LoraReport:
        """Put the updates onto the layers of a model, all or none, and say what was done.

        scale: how strong they are; 1 is what their maker meant. Files can be stacked on one model.
        strict: whether a key without a place is an error; otherwise the report lists it.
        Raises ValueError if keys, shapes or values do not fit the model, or nothing does, RuntimeError if these weights
        are on a model already.
        """
        if self._injected():
            raise RuntimeError(f"{self.file.path} is on a model already: eject it first, or read it once more")
        layers = find_layers(model)
        contents = self._contents(model, layers, strict)
        name = _free_name(
            self.name, self.file.path.stem, {file_name(delta.name) for _, delta in find_deltas(model, layers)}
        )
        attached: list[AttachedUpdate] = []
        adapters: list[DeltaAdapter] = []
        with collection_paused(), transaction():
            placed = [self._placed(update, layers[update.place.path].module) for update in contents.updates]
            for update, parts in zip(contents.updates, placed, strict=True):
                layer = layers[update.place.path]
                delta = make_delta(layer.module, _name_of(update, name), update.kind, parts, update.alpha, scale)
                adapters.append(_adapter_for(layer.module, delta).inject(layer.parent))
                attached.append(attached_update(update, delta.dtype))
        self._adapters = adapters
        return LoraReport(str(self.file.path), name, tuple(attached), contents.left_out)

    def eject(self) -> None:
        """Take the updates off again: the model is as it was, bit by bit. Raises RuntimeError if they are on none."""
        adapters = self._injected()
        if not adapters:
            raise RuntimeError(f"{self.file.path} is on no model, so it cannot be ejected")
        with transaction():
            for adapter in reversed(adapters):
                adapter.eject()
        self._adapters = []

    @property
    def scale(self) -> float | tuple[float, ...]:
        """How strong the updates are now. Raises RuntimeError if they are on no model."""
        return self._ensure_adapters()[0].scale

    @scale.setter
    def scale(self, value: Scale) -> None:
        for adapter in self._ensure_adapters():
            adapter.scale = value

    def _ensure_adapters(self) -> list[DeltaAdapter]:
        adapters = self._injected()
        if not adapters:
            raise RuntimeError(f"{self.file.path} is on no model yet: call patch first")
        return adapters

    def _injected(self) -> list[DeltaAdapter]:
        """The adapters that are on a model; others may have been taken off one by one."""
        return [adapter for adapter in self._adapters if adapter._is_injected]

    def read_for(self, model: Patchable, strict: bool = True, layers: Layers | None = None) -> LoraContents:
        """What of the file goes where on a model: updates with factors that fit, and what is left out.

        layers: those of the model, as `find_layers` gives them, if they were found before.
        The model is not touched. Raises as `patch`.
        """
        contents = self._contents(model, find_layers(model) if layers is None else layers, strict)
        check_finite(_values(self.file.path, contents.updates))
        return contents

    @cached_property
    def _identity(self) -> Identity:
        return identify({key: tuple(tensor.shape) for key, tensor in self.file.tensors.items()})

    def _contents(self, model: Patchable, layers: Layers, strict: bool) -> LoraContents:
        path, tensors, identity = self.file.path, self.file.tensors, self._identity
        _check_family(path, identity, model)
        contents = assign_updates(self.file, model, layers)
        strange = strange_types(self.file.settings)
        if not contents.updates and strange:
            raise ValueError(
                f"{path} is an adapter of peft's {' and '.join(strange)}, a kind that cannot be loaded: merge it into "
                "its model with peft, and extract a LoRA from that"
            )
        if not contents.updates and identity.content is not Content.LORA:
            raise ValueError(f"{path} is no LoRA but {identity}; nothing of it can be attached")
        if contents.left_out and (strict or not contents.updates):
            count, first = len(contents.left_out), contents.left_out[0]
            advice = f"; {_ADVICE}" if contents.updates else ""
            raise ValueError(
                f"{path}: {count} of {len(tensors)} keys cannot be used here, the first is {first}{advice}"
            )
        updates = tuple(self._fitted(update, layers[update.place.path].module) for update in contents.updates)
        return replace(contents, updates=updates)

    def _fitted(self, update: LoraUpdate, layer: nn.Module) -> LoraUpdate:
        try:
            return fitted_update(update, layer)
        except ValueError as error:
            raise ValueError(f"{self.file.path}: {update.name!r} cannot go to {update.place.path}: {error}") from error

    def _placed(self, update: LoraUpdate, layer: nn.Module) -> dict[str, Tensor]:
        """The tensors where and in which number format the layer runs. Raises ValueError if they are not finite there.

        They are looked at once they are there: what was just written is still in the cache.
        """
        weight = cast(Tensor, layer.weight)
        dtype = self.dtype or (weight.dtype if weight.dtype in _COMPUTED else torch.float32)
        placed: dict[str, Tensor] = {}
        for part, tensor in update.tensors.items():
            placed[part] = tensor.to(self.device or weight.device, dtype if tensor.is_floating_point() else None)
            if not is_finite(placed[part]):
                name = f"the {part} of {update.name!r}"
                check_finite([(f"{self.file.path}: {name}", tensor)])
                check_finite([(f"{self.file.path}: in {dtype} {name}", placed[part])])
        return placed


def fitted_update(update: LoraUpdate, layer: nn.Module) -> LoraUpdate:
    """An update whose tensors are as the layer needs them. Raises ValueError, with the reason, if they cannot be."""
    fitted = replace(update, tensors=fit_parts(update))
    if fitted.shown_kind is not Kind.LORA:  # whose shapes are those of the layer by now
        make_delta(layer, update.name, fitted.kind, fitted.tensors, fitted.alpha)
    return fitted


def _adapter_for(layer: nn.Module, delta: Delta) -> DeltaAdapter:
    target = cast(Any, layer)
    return LoraAdapter(target, cast("Lora[Any]", delta)) if isinstance(delta, Lora) else DeltaAdapter(target, delta)


def assign_updates(file: LoraFile, model: Patchable, layers: Layers) -> LoraContents:
    """Find the layer of every update of a file, by name where there are names. Raises ValueError as `parse_updates`."""
    if is_in_order(file.tensors):
        return LoraContents(updates_in_order(file, model, layers), ())
    try:
        return parse_updates(file.tensors, file.settings, layers.places)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def _check_family(path: Path, identity: Identity, model: Patchable) -> None:
    family = family_of(model)
    if identity.family not in (None, family):
        width = model.unet.spec.text_dim
        raise ValueError(
            f"{path} is {identity}, but this model reads text {width} wide{f', as {family}' if family else ''}: get a "
            "LoRA that was made for it"
        )


def file_name(name: str) -> str:
    """The name that all updates of one file share, from that of one of them."""
    return name.removesuffix(_DIFFERENCE)


def _name_of(update: LoraUpdate, name: str) -> str:
    """The name of an update on its layer, where a full difference of the same file may be as well."""
    return f"{name}{_DIFFERENCE}" if update.kind in (Kind.DIFFERENCE, Kind.NORM, Kind.WHOLE) else name


def _values(path: Path, updates: tuple[LoraUpdate, ...]) -> Iterator[tuple[str, Tensor]]:
    for update in updates:
        for part, tensor in update.tensors.items():
            yield f"{path}: the {part} of {update.name!r}", tensor


def _free_name(wanted: str | None, stem: str, taken: set[str]) -> str:
    if wanted is not None:
        if not wanted or wanted != file_name(wanted):
            raise ValueError(f"a LoRA cannot be called {wanted!r}: give it a name that does not end in {_DIFFERENCE!r}")
        if wanted in taken:
            raise ValueError(f"there is a LoRA {wanted!r} on this model already: give this one another name")
        return wanted
    stem = file_name(stem) or "lora"  # a folder given as "." has none
    number, name = 1, stem
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    return name
