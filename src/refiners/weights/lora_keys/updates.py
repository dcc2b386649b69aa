"""From the tensors of a file to the updates of layers, by name: every key gets a place, or a reason why not."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from refiners.weights.lora_keys.kinds import Key, Kind, split_key
from refiners.weights.lora_keys.peft_parts import as_of_lycoris
from refiners.weights.lora_keys.places import Place, Places
from refiners.weights.lora_keys.settings import Settings

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHORT_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# The parts that an update of a kind cannot do without: any of these sets will do.
_NEEDED: dict[Kind, tuple[set[str], ...]] = {
    Kind.LORA: ({"down", "up"},),
    Kind.ADALORA: ({"down", "up", "values"},),
    Kind.EMBEDDING: ({"down", "up"},),
    Kind.LOHA: ({"w1_a", "w1_b", "w2_a", "w2_b"},),
    Kind.LOKR: tuple(
        {*first, *second} for first in (["w1"], ["w1_a", "w1_b"]) for second in (["w2"], ["w2_a", "w2_b"])
    ),
    Kind.GLORA: ({"a1", "a2", "b1", "b2"},),
    Kind.ELEMENTWISE_GLORA: (set(),),
    Kind.IA3: ({"l"}, {"weight", "on_input"}),
    Kind.OFT: ({"blocks"}, {"diag"}),
    Kind.BOFT: ({"R", "s"},),
}
# Parts whose first dimension is the rank.
_RANK_FIRST: dict[Kind, tuple[str, ...]] = {
    Kind.LORA: ("down",),
    Kind.ADALORA: ("down",),
    Kind.EMBEDDING: ("down",),
    Kind.LOHA: ("w1_b",),
    Kind.LOKR: ("w2_b", "w1_b"),
    Kind.GLORA: ("a2",),
}
# What a layer may have besides an update of another kind: changes of its own, of the bias for the most part.
_COMPANIONS = (Kind.DIFFERENCE, Kind.NORM, Kind.WHOLE)
_STRANGE = (Kind.VERA, Kind.CUSTOM)  # whose keys name no layer
_WITH_ALPHA = (*_RANK_FIRST, Kind.OFT)  # that of an OFT is its constraint
_COUNTS = ("on_input", "terms")  # parts that are whole numbers
_MOST = 100  # that they can be: what they count is worked out as often
_MAX_EXPLAINED = 40  # left-out keys for which the nearest known name is looked up


@dataclass(frozen=True)
class LoraUpdate:
    """What a file holds for one layer.

    name: of the layer, in the file.
    kind: which kind of update it is; `tensors` are its parts by name, as `Key.part`. If "magnitude" is among them, it
        is a DoRA whose direction is of this kind.
    alpha, rank: of kinds that have them, whose strength is alpha / rank, times the scale that it is used with.
    """

    place: Place
    name: str
    kind: Kind
    tensors: Mapping[str, Tensor]
    alpha: float | None = None
    rank: int | None = None

    @property
    def shown_kind(self) -> Kind:
        """The kind by the name that people know it by."""
        return Kind.DORA if "magnitude" in self.tensors else self.kind

    @property
    def strength(self) -> float:
        """The alpha over the rank; 1 for kinds without."""
        return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank


@dataclass(frozen=True)
class LeftOut:
    """A key that does nothing here, and why; nearest: the known name that comes nearest to an unknown one."""

    key: str
    reason: str
    nearest: str | None = None

    def __str__(self) -> str:
        hint = f" (the nearest known name is {self.nearest!r})" if self.nearest else ""
        return f"{self.key!r}: {self.reason}{hint}"


@dataclass(frozen=True)
class LoraContents:
    """A file of updates as a value: what it does, and what of it has no use here."""

    updates: tuple[LoraUpdate, ...]
    left_out: tuple[LeftOut, ...]


@dataclass
class _Group:
    """The keys of one layer, by the kind and the name of the part that each holds."""

    name: str
    keys: dict[tuple[Kind | None, str], str] = field(default_factory=dict[tuple[Kind | None, str], str])

    def of(self, *kinds: Kind) -> dict[str, str]:
        """The keys of parts of some kinds, by part."""
        return {part: key for (kind, part), key in self.keys.items() if kind in kinds}


def parse_updates(tensors: Mapping[str, Tensor], settings: Mapping[str, Settings], places: Places) -> LoraContents:
    """Find the place of every key, and the alpha and rank of every update; the values of weights are not looked at.

    settings: as read by `parse_settings`.
    Raises ValueError if two keys are the same part of the same layer, an alpha is no number, or what peft has as zeros
    is not.
    """
    groups, left_out = _group(tensors, settings, places)
    updates: list[LoraUpdate] = []
    for place, group in groups.items():
        used: set[str] = set()
        kinds, reason = _kinds_of(group)
        for kind in kinds:
            found, keys = _updates_of(place, group, kind, tensors, settings)
            updates += found
            used |= keys
        left_out += [LeftOut(key, reason) for key in group.keys.values() if key not in used]
    left_out += _lost_biases(updates, settings)
    if not settings and all(update.kind is Kind.WHOLE for update in updates):  # a model, or a part of one
        keys = [key for group in groups.values() for key in group.of(Kind.WHOLE).values()]
        return LoraContents((), (*left_out, *(LeftOut(key, "whole weights alone are no adapter") for key in keys)))
    return LoraContents(tuple(updates), tuple(left_out))


def _group(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Settings], places: Places
) -> tuple[dict[Place, _Group], list[LeftOut]]:
    groups: dict[Place, _Group] = {}
    left_out: list[LeftOut] = []
    for key in tensors:
        found = split_key(key)
        place = places.find(found.layer) if found else None
        if found is None or place is None:
            left_out.append(_explain(key, found, settings, places, can_look=len(left_out) < _MAX_EXPLAINED))
            continue
        group = groups.setdefault(place, _Group(found.layer))
        other = group.keys.setdefault((found.kind, found.part), key)
        if other != key:
            raise ValueError(
                f"{other!r} and {key!r} are both the {found.part} of {place.path}; "
                "this file holds several updates of one layer: split it into one file each"
            )
    return groups, left_out


def _kinds_of(group: _Group) -> tuple[list[Kind], str]:
    """Which updates the parts of a layer make up, and why what is left of them makes up none."""
    there = {kind for kind, _ in group.keys if kind is not None}
    if Kind.IA3 in there:
        there -= {Kind.WHOLE}  # its weight is called so
    if Kind.LORA in there:
        there -= {Kind.BIAS}
    kinds = [kind for kind in _COMPANIONS if kind in there]
    others = sorted(there - {Kind.DORA, *_COMPANIONS})
    if len(others) > 1 or (others and others[0] not in _NEEDED):
        strange = next((kind for kind in others if kind not in _NEEDED), None)
        if strange is None:
            return kinds, f"{group.name!r} has parts of several kinds of updates: {', '.join(others)}"
        return kinds, _cannot_load(strange)
    if not others:
        return kinds, f"{group.name!r} has no weights in this file that this could belong to"
    (kind,) = others
    parts = set(group.of(*_kinds_with(kind)))
    missing = min((needed - parts for needed in _NEEDED[kind]), key=len)
    if missing:
        return kinds, f"{group.name!r} has no {' and no '.join(sorted(missing))} in this file"
    return [*kinds, kind], f"{kind} has no such part"


def _kinds_with(kind: Kind) -> tuple[Kind, ...]:
    """The kinds whose parts an update of this kind takes."""
    if kind is Kind.IA3:
        return Kind.IA3, Kind.WHOLE
    return (kind, Kind.DORA) if kind in (Kind.LORA, Kind.EMBEDDING, Kind.LOHA, Kind.LOKR) else (kind,)


def _lost_biases(updates: Iterable[LoraUpdate], settings: Mapping[str, Settings]) -> Iterator[LeftOut]:
    """The biases that were trained and are not in the file, as peft saves them for `bias="all"` of a LoRA alone."""
    whole = {update.place for update in updates if update.kind is Kind.WHOLE and "bias" in update.tensors}
    for update in updates:
        own, place = _settings_for(update.place, settings), update.place
        if own is not None and own.has_biases and place.has_bias and place not in whole and update.kind in _NEEDED:
            yield LeftOut(f"{update.name}.bias", "it was trained, as the settings say, but peft has left it out")


def _settings_for(place: Place, settings: Mapping[str, Settings]) -> Settings | None:
    return settings.get(place.component.dotted[0].removesuffix("."), settings.get(""))


def _explain(key: str, found: Key | None, settings: Mapping[str, Settings], places: Places, can_look: bool) -> LeftOut:
    if found is None:
        strange = strange_types(settings)
        of_peft = f", and peft's {' and '.join(strange)} cannot be loaded" if strange else ""
        return LeftOut(key, f"it ends in no part of any known kind of update{of_peft}")
    if found.kind is not None and found.kind in _STRANGE:
        return LeftOut(key, _cannot_load(found.kind))
    return LeftOut(key, "no layer of this model has this name", places.nearest(found.layer) if can_look else None)


def strange_types(settings: Mapping[str, Settings]) -> list[str]:
    """What peft calls adapters of these settings, where it is a kind that cannot be loaded."""
    types = {own.peft_type for own in settings.values() if own.peft_type is not None}
    return sorted(types - {"LORA", "ADALORA", "LOHA", "LOKR", "GLORA", "OFT", "BOFT", "IA3", "LN_TUNING"})


def _cannot_load(kind: Kind) -> str:
    return f"{kind} is a kind of update that cannot be loaded"


def _updates_of(
    place: Place, group: _Group, kind: Kind, tensors: Mapping[str, Tensor], settings: Mapping[str, Settings]
) -> tuple[list[LoraUpdate], set[str]]:
    """An update, if it does anything, and the keys of it; with it the bias that a LoRA may have on its way up."""
    keys = group.of(*_kinds_with(kind))
    parts = {part: tensors[key] for part, key in keys.items()}
    alpha, rank, used = None, _rank_of(kind, parts), set(keys.values())
    alpha_key = group.keys.get((None, "alpha"))
    if alpha_key is not None and kind in _WITH_ALPHA:
        alpha = alpha_of(alpha_key, tensors[alpha_key])
        used.add(alpha_key)
    own = _settings_for(place, settings)
    name = place.names[0].removeprefix(place.component.hidden)
    if alpha is None and rank is not None:
        alpha = float(rank) if own is None else _single(own.alpha_of(name, rank))
    if kind is Kind.GLORA and own is not None and own.is_rank_stabilised and alpha is not None and rank:
        alpha = _single(alpha * math.sqrt(rank))  # that of the other kinds is written so by LyCORIS
    parts = as_of_lycoris(kind, parts, keys, own, name, alpha)
    if kind is Kind.ELEMENTWISE_GLORA:
        parts = _without_zeros(parts, keys)
    if not parts or (kind is Kind.ADALORA and rank == 0):  # all is off, or training has found the layer to need none
        return [], used
    usual = Kind.LORA if kind is Kind.ADALORA else kind
    updates = [LoraUpdate(place, group.name, usual, parts, alpha, rank)]
    bias_key = group.keys.get((Kind.BIAS, "bias"))
    if kind is Kind.LORA and bias_key is not None:
        bias = {"bias": tensors[bias_key] * updates[0].strength}
        updates.append(LoraUpdate(place, group.name, Kind.DIFFERENCE, bias))
        used.add(bias_key)
    return updates, used


def _without_zeros(parts: Mapping[str, Tensor], keys: Mapping[str, str]) -> dict[str, Tensor]:
    for part, tensor in parts.items():
        if part.endswith("zeros") and not tensor.is_meta and (tensor.dtype not in _FLOATS or tensor.any()):
            raise ValueError(f"{keys[part]!r} should hold zeros, as what it stands for is off, but it does not")
    return {part: tensor for part, tensor in parts.items() if not part.endswith("zeros")}


def starts_with_rank(kind: Kind | None, part: str) -> bool:
    """Whether the first size of this part of an update is the rank."""
    return kind is not None and part in _RANK_FIRST.get(kind, ())


def _rank_of(kind: Kind, parts: Mapping[str, Tensor]) -> int | None:
    """The inner dimension of the factors, or None if there are none."""
    for part in _RANK_FIRST.get(kind, ()):
        if part in parts:
            return parts[part].shape[0] if parts[part].ndim else 0
    return None


def alpha_of(key: str, tensor: Tensor) -> float:
    """The alpha that a file holds as a tensor. Raises ValueError if it is not one finite number."""
    if tensor.numel() != 1 or tensor.dtype not in (*_FLOATS, *_SHORT_FLOATS, *_INTEGERS):
        raise ValueError(f"{key!r} should be one number, but it has shape {tuple(tensor.shape)} and is {tensor.dtype}")
    value = tensor.float().item()  # as it will be saved
    if not math.isfinite(value):
        raise ValueError(
            f"{key!r} is {value}, but an alpha must be finite; this file is damaged or its training failed"
        )
    return value


def _single(value: float) -> float:
    """The number as it will be saved."""
    return torch.tensor(value, dtype=torch.float32).item()


def fit_parts(update: LoraUpdate) -> dict[str, Tensor]:
    """The tensors of an update in the form that the layer needs.

    Factors of a LoRA for a 1x1 convolution may be stored as those for a linear layer and the reverse, kernels
    flattened. They become (rank, in), (out, rank), or for convolutions with kernels behind. Others stay as they are.
    Raises ValueError, with the reason, if there are numbers of the wrong format or a LoRA does not fit the layer.
    """
    for part, tensor in update.tensors.items():
        if part not in _COUNTS and tensor.dtype not in (*_FLOATS, *_SHORT_FLOATS):
            raise ValueError(f"its {part} is {tensor.dtype}, but it should be floating point")
        if part in _COUNTS:
            _check_count(part, tensor)
        if not tensor.numel():
            raise ValueError(f"its {part} has shape {tuple(tensor.shape)}, so it is empty")
    return dict(update.tensors) if update.kind is not Kind.LORA else _fit_factors(update)


def _check_count(part: str, tensor: Tensor) -> None:
    if tensor.numel() != 1 or tensor.dtype not in (torch.bool, *_FLOATS, *_INTEGERS):
        raise ValueError(
            f"its {part} has shape {tuple(tensor.shape)} and is {tensor.dtype}, but it should be one number"
        )
    if not tensor.is_meta and not 0 <= tensor.item() <= _MOST:
        raise ValueError(f"its {part} is {tensor.item()}, but it should be from 0 to {_MOST}")


def _fit_factors(update: LoraUpdate) -> dict[str, Tensor]:
    place, rank = update.place, update.rank or 0
    if place.layer not in ("linear", "convolution"):
        raise ValueError(f"the layer is a {place.layer}, and a LoRA can only be added to a linear or a convolution")
    out, *inner = place.shape
    kernel = inner[1:]
    shapes = {"down": (rank, *inner), "up": (out, rank, *[1] * len(kernel))}
    if "mid" in update.tensors:
        shapes |= {"down": (rank, *inner[:1], *[1] * len(kernel)), "mid": (rank, rank, *kernel)}
    fitted = {part: _reshaped(update.tensors[part], shape) for part, shape in shapes.items()}
    found = {part: tensor for part, tensor in fitted.items() if tensor is not None}
    if len(found) < len(fitted) or ("mid" in fitted and not kernel):
        raise ValueError(_misfit(update))
    return {part: found.get(part, tensor) for part, tensor in update.tensors.items()}


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises ValueError naming the first tensor that holds NaN or infinity."""
    for key, tensor in tensors:
        if not is_finite(tensor):
            raise ValueError(f"{key} has values that are NaN or infinite; this file is damaged or its training failed")


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; True for a tensor without values."""
    if tensor.is_meta:
        return True
    values = tensor.float() if tensor.dtype in _SHORT_FLOATS else tensor
    # a sum is a quick witness: NaN and infinity come through; one that overflows is looked at closely
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())


def _reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The tensor in a shape that differs by no more than flattened kernels or sizes of 1 at the end; else None."""
    if tensor.shape == shape:
        return tensor
    if tensor.ndim < 2 or tensor.shape[0] != shape[0] or tensor.numel() != torch.Size(shape).numel():
        return None
    is_flat = tensor.ndim == 2
    has_ones_only = tensor.shape[1] == shape[1] and all(size == 1 for size in tensor.shape[2:])
    return tensor.reshape(shape) if is_flat or has_ones_only else None


def _misfit(update: LoraUpdate) -> str:
    place, tensors = update.place, update.tensors
    shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in tensors.items())
    down, up = tensors["down"], tensors["up"]
    text = f"{shapes} do not fit the {place.layer} with a weight of {place.shape}"
    if down.ndim < 2 or up.ndim < 2:
        return text
    if down.shape[0] == place.shape[0] and up.shape[1] == place.shape[1] and down.shape[1] == up.shape[0]:
        return f"{text}: down and up are swapped"
    if down.shape[0] != up.shape[1]:
        return f"{text}: down is of rank {down.shape[0]}, up of rank {up.shape[1]}"
    return text
