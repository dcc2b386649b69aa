"""`model.loras`: the weight updates on a diffusion model, by name: add, scale, switch off, remove, merge.

What there is is read off the trees each time, so updates that were injected in another way, or trained, are there too.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, cast

from refiners.adapters.delta import Delta, Scale, checked_scale
from refiners.adapters.delta_adapter import DeltaAdapter
from refiners.adapters.merging import Merged, merge
from refiners.fluxion.layers.transaction import transaction
from refiners.foundationals.latent_diffusion.copies import Twins
from refiners.foundationals.latent_diffusion.lora.blocks import Blocks, block_factors
from refiners.foundationals.latent_diffusion.lora.places import Layer, Patchable, find_deltas, find_layers
from refiners.foundationals.latent_diffusion.lora.report import LoraReport
from refiners.foundationals.latent_diffusion.lora.slot import LoraSlot
from refiners.foundationals.latent_diffusion.lora.weights import LoraWeights, file_name
from refiners.weights.lora_keys import UNET

# How strong something is at a step: of its number, 0 … count - 1, and how many there are.
Schedule = Callable[[int, int], float]


@dataclass(frozen=True)
class Scheduled:
    """Updates whose scale depends on the step, each with what it is multiplied with.

    early: those of text encoders, which run before the first step, and so keep the scale of that.
    """

    schedule: Schedule
    deltas: tuple[tuple[Delta, float], ...]
    early: tuple[tuple[Delta, float], ...] = ()

    def copied(self, twins: Twins) -> Self:
        """The same for a copy of the model; updates that have left the model since are left out."""
        late, early = (
            tuple((cast(Delta, twins[delta]), factor) for delta, factor in pairs if delta in twins)
            for pairs in (self.deltas, self.early)
        )
        return replace(self, deltas=late, early=early)

    def before_step(self, index: int, count: int) -> None:
        """Set the scales for a step."""
        for deltas, step in ((self.deltas, index), (self.early, 0)):
            scale = checked_scale(self.schedule(step, count))
            for delta, factor in deltas:
                delta.scale = _times(scale, factor)


class Loras:
    """The weight updates on a model, by name; made by `model.loras`.

    >>> from refiners.foundationals.latent_diffusion import StableDiffusion_1
    >>> sd = StableDiffusion_1.from_pretrained("builtin")
    >>> len(sd.loras)
    0
    """

    def __init__(self, model: Patchable, schedules: dict[str, Scheduled]) -> None:
        self._model = model
        self._schedules = schedules

    # -- what there is

    def __iter__(self) -> Iterator[str]:
        """The names, in the order of the trees."""
        return iter(dict.fromkeys(file_name(delta.name) for _, delta in self._found()))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(known == name for known in self)

    def __getitem__(self, name: str) -> list[Delta]:
        """The updates of that name. Raises KeyError if there is none."""
        return [delta for _, delta in self._of(name)]

    @property
    def scales(self) -> dict[str, set[float | tuple[float, ...]]]:
        """The scales that the updates of each name have; several where blocks differ."""
        found: dict[str, set[float | tuple[float, ...]]] = {}
        for _, delta in self._found():
            found.setdefault(file_name(delta.name), set()).add(delta.scale)
        return found

    # -- edits

    def add(
        self,
        lora: Path | str | LoraWeights,
        name: str | None = None,
        scale: Scale | Schedule = 1.0,
        blocks: Blocks | None = None,
        strict: bool = True,
    ) -> LoraReport:
        """Put a LoRA file of any kind on the model, all or nothing, and say what was done.

        name: None for that of the file.  scale, blocks: see `set_scale`.  strict: see `LoraWeights.patch`.
        """
        weights = lora if isinstance(lora, LoraWeights) else LoraWeights(lora, name=name)
        if isinstance(lora, LoraWeights) and name is not None:
            weights.name = name
        with transaction():
            report = weights.patch(self._model, 1.0 if callable(scale) else scale, strict)
            if callable(scale) or blocks is not None:
                self.set_scale(report.name, scale, blocks)
        return report

    def set_scale(self, name: str, scale: Scale | Schedule, blocks: Blocks | None = None) -> None:
        """Set how strong the updates of a name are: all, or on an error none. What was compiled stays good.

        scale: a number; one for each picture of a batch; or a function of the step, 0 … count - 1, and the count, which
            the model calls before each step; a text encoder, which has run by then, keeps the scale of the first.
        blocks: what the scale is multiplied with in parts of the model, see `lora_blocks`.
        Raises KeyError if there is no such name, TypeError or ValueError if the scale is none or a block fits no layer.
        """
        chosen = self._of(name)
        factors = block_factors([layer.place if layer else None for layer, _ in chosen], blocks)
        pairs = tuple((delta, factor) for (_, delta), factor in zip(chosen, factors, strict=True))
        if callable(scale):
            late, early = (
                tuple(pair for (layer, _), pair in zip(chosen, pairs, strict=True) if _is_early(layer) is is_early)
                for is_early in (False, True)
            )
            scheduled = Scheduled(scale, late, early)
            scheduled.before_step(0, len(getattr(self._model, "steps", ())) or 1)
            self._schedules[name] = scheduled
            return
        kept = checked_scale(scale)
        scales = [checked_scale(_times(kept, factor)) for factor in factors]  # all of them, before any is set
        self._schedules.pop(name, None)
        for (delta, _), own in zip(pairs, scales, strict=True):
            delta.scale = own

    def enable(self, *names: str) -> None:
        """Switch updates on; all if no name is given. Raises KeyError if there is no such name."""
        self._switch(names, True)

    def disable(self, *names: str) -> None:
        """Switch updates off, all if no name is given: they keep their scales, and do nothing."""
        self._switch(names, False)

    def remove(self, *names: str) -> None:
        """Take updates off the model, all or none of those named; it is as it was without them, bit by bit.

        Raises KeyError if there is no such name.
        """
        chosen = {id(delta) for name in names for _, delta in self._of(name)}
        with transaction():
            for adapter in _adapters(self._model):
                own = [delta.name for delta in adapter.deltas.values() if id(delta) in chosen]
                if len(own) == len(adapter.deltas):
                    adapter.eject()
                else:
                    for delta_name in own:
                        adapter.remove_delta(delta_name)
        for name in names:
            self._schedules.pop(name, None)

    def clear(self) -> None:
        """Take all updates off."""
        self.remove(*self)

    @contextmanager
    def applied(
        self,
        lora: Path | str | LoraWeights,
        scale: Scale | Schedule = 1.0,
        blocks: Blocks | None = None,
        strict: bool = True,
    ) -> Generator[LoraReport]:
        """Inside `with`, a LoRA is on the model; afterwards it is off again. See `add`."""
        report = self.add(lora, scale=scale, blocks=blocks, strict=strict)
        try:
            yield report
        finally:
            if report.name in self:
                self.remove(report.name)

    @contextmanager
    def only(self, *names: str) -> Generator[None]:
        """Inside `with`, the updates of these names are on and all others off; afterwards all are as before."""
        for name in names:
            self._of(name)
        before = [(delta, delta.is_enabled) for _, delta in self._found()]
        try:
            for delta, _ in before:
                delta.is_enabled = file_name(delta.name) in names
            yield
        finally:
            for delta, is_enabled in before:
                delta.is_enabled = is_enabled

    def merge(self, *names: str) -> Merged:
        """Write updates into the weights, all if no name is given: `unmerge` of what is returned takes them out again.

        Raises as `refiners.adapters.merging.merge`, and KeyError if there is no such name. A schedule ends.
        """
        names = names or tuple(self)
        deltas = {id(delta) for name in names for _, delta in self._of(name)}
        adapters = [adapter for adapter in _adapters(self._model) if _holds(adapter, deltas)]
        merged = merge(adapters)
        for name in names:
            self._schedules.pop(name, None)
        return merged

    def reserve(self, rank: int, name: str = "slot") -> LoraSlot:
        """Make room for one LoRA after another, of up to a rank, on a model that is compiled only once.

        >>> from refiners.foundationals.latent_diffusion import StableDiffusion_1
        >>> sd = StableDiffusion_1.from_pretrained("builtin")
        >>> slot = sd.loras.reserve(rank=4)
        >>> sd.loras.scales
        {'slot': {0.0}}

        Raises ValueError if the name is taken or the rank is not at least 1.
        """
        if name in self:
            raise ValueError(f"there is a LoRA {name!r} on this model already: give the slot another name")
        return LoraSlot(self._model, rank, name)

    # -- how

    def _found(self) -> list[tuple[Layer | None, Delta]]:
        return list(find_deltas(self._model, find_layers(self._model)))

    def _of(self, name: str) -> list[tuple[Layer | None, Delta]]:
        found = self._found()
        chosen = [(layer, delta) for layer, delta in found if file_name(delta.name) == name]
        if not chosen:
            there = ", ".join(dict.fromkeys(file_name(delta.name) for _, delta in found))
            raise KeyError(f"there is no LoRA {name!r} on this model; there are: {there or 'none'}")
        return chosen

    def _switch(self, names: Sequence[str], is_enabled: bool) -> None:
        chosen = [delta for name in names or list(self) for _, delta in self._of(name)]
        for delta in chosen:
            delta.is_enabled = is_enabled


def _is_early(layer: Layer | None) -> bool:
    """Whether a layer is of a text encoder."""
    return layer is not None and layer.place.component.name != UNET.name


def _times(scale: float | tuple[float, ...], factor: float) -> Scale:
    return [value * factor for value in scale] if isinstance(scale, tuple) else scale * factor


def _adapters(model: Patchable) -> list[DeltaAdapter]:
    trees = (model.unet, model.clip_text_encoder)
    return [adapter for tree in trees for adapter, _ in tree.walk(DeltaAdapter, recurse=True)]


def _holds(adapter: DeltaAdapter, deltas: set[int]) -> bool:
    """Whether all updates of an adapter are among `deltas`. Raises ValueError if only some are."""
    held = [id(delta) in deltas for delta in adapter.deltas.values()]
    if any(held) and not all(held):
        raise ValueError(
            f"the adapter at {adapter.get_path()} holds updates of several names ({', '.join(adapter.names)}), which "
            "can only be merged together: name them all"
        )
    return any(held)
