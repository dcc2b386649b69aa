"""A place for one LoRA after another on a model that may be compiled: what is swapped is values, never the tree."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from refiners.adapters.delta import Scale, checked_scale
from refiners.adapters.lora import Lora, LoraAdapter, lora_class
from refiners.fluxion.layers.transaction import transaction
from refiners.foundationals.latent_diffusion.lora.places import Patchable, find_layers
from refiners.foundationals.latent_diffusion.lora.report import LoraReport, attached_update
from refiners.foundationals.latent_diffusion.lora.weights import LoraWeights
from refiners.weights.lora_keys import Kind, LoraContents, LoraUpdate, check_finite


class LoraSlot:
    """Room for a LoRA of up to `rank` on every linear layer and convolution; made by `model.loras.reserve`.

    A layer that a LoRA does not touch costs as much as one that it does, so do not reserve more rank than needed.
    """

    def __init__(self, model: Patchable, rank: int, name: str) -> None:
        self.name = name
        self.rank = rank
        self._model = model
        self._loras: dict[str, Lora[Any]] = {}
        self._adapters: list[LoraAdapter] = []
        self._known: WeakKeyDictionary[LoraWeights, LoraContents] = WeakKeyDictionary()  # what fits, found once
        self._held: set[str] = set()  # the paths of the layers that the LoRA in it is on
        self._layers = find_layers(model)
        with transaction():
            for path, layer in self._layers.items():
                if isinstance(layer.module, nn.Linear | nn.Conv2d):
                    target = cast(Any, layer.module)
                    lora: Lora[Any] = lora_class(target).for_layer(target, name, rank, 0.0)
                    self._adapters.append(LoraAdapter(target, lora).inject(layer.parent))
                    self._loras[path] = lora

    def load(self, lora: Path | str | LoraWeights, scale: Scale = 1.0, strict: bool = True) -> LoraReport:
        """Put a LoRA in the place of the one that is there, all or nothing, and say what was done.

        Raises ValueError as `LoraWeights.patch`, and if a rank is above that of the slot, or an update is no LoRA;
        TypeError if the scale is no number; RuntimeError if the slot was removed from the model or merged.
        A `LoraWeights` that was in it before is put back without another look at its file.
        """
        if not all(adapter._is_injected for adapter in self._adapters):
            raise RuntimeError(
                f"the slot {self.name!r} is not on the model any more: reserve another, or unmerge it if it was merged"
            )
        kept = checked_scale(scale)
        weights = lora if isinstance(lora, LoraWeights) else LoraWeights(lora)
        contents = self._known.get(weights)
        if contents is None or (strict and contents.left_out):
            contents = weights.read_for(self._model, strict, self._layers)
            for update in contents.updates:
                self._check(weights.file.path, update)
            self._known[weights] = contents
        updates = {update.place.path: update for update in contents.updates}
        factors = {path: self._placed(weights.file.path, update) for path, update in updates.items()}
        self._empty(self._loras.keys() - updates.keys())
        for path, update in updates.items():
            own = self._loras[path]
            _fill(own, *factors[path])
            own.set_strength(update.strength * self.rank, kept)
        self._held = set(updates)
        attached = tuple(attached_update(update, self._loras[path].dtype) for path, update in updates.items())
        return LoraReport(str(weights.file.path), self.name, attached, contents.left_out)

    def clear(self) -> None:
        """Leave the slot empty: the model is as it was without it, up to rounding."""
        self._empty(self._loras.keys())

    @torch.no_grad()
    def _empty(self, paths: Iterable[str]) -> None:
        """Take the LoRA off layers for good: a scale that is set later brings nothing of it back."""
        for path in paths:
            own = self._loras[path]
            if path in self._held:
                own.up.weight.zero_()
            if own.scale != 0.0:
                own.scale = 0.0
        self._held -= set(paths)

    def _check(self, path: Path, update: LoraUpdate) -> None:
        if update.shown_kind is not Kind.LORA:
            raise ValueError(
                f"{path}: {update.name!r} is {update.shown_kind.with_article}, and a slot holds LoRA only: convert the "
                "file to LoRA, or add it to model.loras"
            )
        if (update.rank or 0) > self.rank:
            raise ValueError(
                f"{path}: {update.name!r} has rank {update.rank}, and the slot {self.name!r} holds up to {self.rank}: "
                "reserve more, or resize the file"
            )

    def _placed(self, path: Path, update: LoraUpdate) -> tuple[Tensor, Tensor]:
        """The ways down and up. Raises ValueError if they leave the range of the layer's number format."""
        dtype, placed = self._loras[update.place.path].dtype, list[Tensor]()
        for part, tensor in zip(("down", "up"), folded(update), strict=True):
            if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
                tensor = tensor.to(dtype)
                check_finite([(f"{path}: in {dtype} the {part} of {update.name!r}", tensor)])
            placed.append(tensor)
        return placed[0], placed[1]


@torch.no_grad()
def _fill(own: Lora[Any], down: Tensor, up: Tensor) -> None:
    rank = down.shape[0]
    own.down.weight[:rank].copy_(down)
    own.up.weight[:, :rank].copy_(up)
    if rank < own.rank:
        own.up.weight[:, rank:].zero_()


def folded(update: LoraUpdate) -> tuple[Tensor, Tensor]:
    """The way down and the way up of a LoRA; the core of a Tucker decomposition is multiplied into the way down."""
    down, up, mid = update.tensors["down"], update.tensors["up"], update.tensors.get("mid")
    if mid is not None:
        down = torch.einsum("rshw,si->rihw", mid.float(), down.float().flatten(1))
    return down, up
