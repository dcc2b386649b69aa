"""From the tensors of a file to the updates of layers, by name: every key gets a place, or a reason why not."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from refiners.weights.lora_keys.kinds import Key, Kind, kind_of, split_key
from refiners.weights.lora_keys.places import Place, Places
from refiners.weights.lora_keys.settings import Settings

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHORT_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_MAX_EXPLAINED = 40  # left-out keys for which the nearest known name is looked up


@dataclass(frozen=True)
class LoraUpdate:
    """What a file holds for one layer.

    name: of the layer, in the file.
    kind: which kind of update it is; `tensors` are its parts by name: for a LoRA "down", "up" and perhaps "mid".
    alpha: its strength is alpha / rank, times the scale that it is used with.
    """

    place: Place
    name: str
    kind: Kind
    tensors: Mapping[str, Tensor]
    alpha: float
    rank: int


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
    """The keys of one layer."""

    names: list[str] = field(default_factory=list[str])
    kinds: set[Kind | None] = field(default_factory=set[Kind | None])
    keys: dict[str, str] = field(default_factory=dict[str, str])  # part -> key


def parse_updates(tensors: Mapping[str, Tensor], settings: Mapping[str, Settings], places: Places) -> LoraContents:
    """Find the place of every key, and the alpha and rank of every update; the tensors' values are not looked at.

    settings: as read by `parse_settings`.
    Raises ValueError if two keys are the same part of the same layer, or if an alpha is no number.
    """
    groups, left_out = _group(tensors, places)
    updates: list[LoraUpdate] = []
    for place, group in groups.items():
        kind = kind_of(group.kinds)
        missing = [part for part in ("down", "up") if part not in group.keys] if kind is Kind.LORA else []
        if kind is None or missing:
            reason = f"{group.names[0]!r} has no {' and no '.join(missing or ['weights'])} in this file"
            left_out += [LeftOut(key, reason) for key in group.keys.values()]
        elif kind is not Kind.LORA:
            reason = f"{kind} is a kind of update that cannot be loaded yet"
            left_out += [LeftOut(key, reason) for key in group.keys.values()]
        else:
            updates.append(_update(place, group, tensors, settings))
    return LoraContents(tuple(updates), tuple(left_out))


def _group(tensors: Mapping[str, Tensor], places: Places) -> tuple[dict[Place, _Group], list[LeftOut]]:
    groups: dict[Place, _Group] = {}
    left_out: list[LeftOut] = []
    for key in tensors:
        found = split_key(key)
        place = places.find(found.layer) if found else None
        if found is None or place is None:
            left_out.append(_explain(key, found, places, can_look=len(left_out) < _MAX_EXPLAINED))
            continue
        group = groups.setdefault(place, _Group())
        other = group.keys.setdefault(found.part, key)
        if other != key:
            raise ValueError(
                f"{other!r} and {key!r} are both the {found.part} of {place.path}; "
                "this file holds several updates of one layer: split it into one file each"
            )
        group.names.append(found.layer)
        group.kinds.add(found.kind)
    return groups, left_out


def _explain(key: str, found: Key | None, places: Places, can_look: bool) -> LeftOut:
    if found is None:
        return LeftOut(key, "it ends in no part of any known kind of update")
    return LeftOut(key, "no layer of this model has this name", places.nearest(found.layer) if can_look else None)


def _update(place: Place, group: _Group, tensors: Mapping[str, Tensor], settings: Mapping[str, Settings]) -> LoraUpdate:
    parts = {part: tensors[key] for part, key in group.keys.items() if part != "alpha"}
    rank = parts["down"].shape[0] if parts["down"].ndim else 0
    alpha_key = group.keys.get("alpha")
    if alpha_key is not None:
        alpha = _alpha(alpha_key, tensors[alpha_key])
    else:
        alpha = _alpha_of_settings(place, rank, settings)
    return LoraUpdate(place, group.names[0], Kind.LORA, parts, alpha, rank)


def _alpha(key: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or tensor.is_complex():
        raise ValueError(f"{key!r} should be one number, but it has shape {tuple(tensor.shape)} and is {tensor.dtype}")
    value = float(tensor.item())
    if not math.isfinite(value):
        raise ValueError(
            f"{key!r} is {value}, but an alpha must be finite; this file is damaged or its training failed"
        )
    return value


def _alpha_of_settings(place: Place, rank: int, settings: Mapping[str, Settings]) -> float:
    """The alpha that the settings give; without any it is the rank, so that the strength is 1."""
    of_this = settings.get(place.component.dotted[0].removesuffix("."), settings.get(""))
    if of_this is None:
        return float(rank)
    name = place.names[0].removeprefix(place.component.hidden)
    return torch.tensor(of_this.alpha_of(name, rank), dtype=torch.float32).item()  # as it will be saved


def fit_factors(update: LoraUpdate) -> tuple[Tensor, Tensor]:
    """The factors in the form that the layer needs: (rank, in), (out, rank), or for convolutions with kernels behind.

    Factors of 1x1 convolutions may be stored as those of linear layers and the reverse; the core of a Tucker
    decomposition (`mid`) is multiplied into the way down: up(mid(down(x))) = up((mid · down)(x)).
    Raises ValueError, with the reason, if they do not fit the layer.
    """
    place, down, up = update.place, update.tensors["down"], update.tensors["up"]
    if place.layer not in ("linear", "convolution"):
        raise ValueError(f"the layer is a {place.layer}, and a LoRA can only be added to a linear or a convolution")
    for part, tensor in update.tensors.items():
        if tensor.dtype not in (*_FLOATS, *_SHORT_FLOATS):
            raise ValueError(f"its {part} is {tensor.dtype}, but it should be floating point")
        if not tensor.numel():
            raise ValueError(f"its {part} has shape {tuple(tensor.shape)}, so it is empty")
    out, *inner = place.shape
    kernel = inner[1:]
    fitted_up = _reshaped(up, (out, update.rank, *[1] * len(kernel)))
    if "mid" in update.tensors:
        down = _fold(update.tensors["mid"], down, kernel)
    fitted_down = None if down is None else _reshaped(down, (update.rank, *inner))
    if fitted_down is None or fitted_up is None:
        raise ValueError(_misfit(update))
    return fitted_down, fitted_up


def check_finite(tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Raises ValueError naming the first tensor that holds NaN or infinity."""
    for key, tensor in tensors:
        if tensor.is_meta:
            continue
        values = tensor.float() if tensor.dtype in _SHORT_FLOATS else tensor
        # a sum is a quick witness: NaN and infinity come through; one that overflows is looked at closely
        if not values.sum(dtype=torch.float32).isfinite() and not values.isfinite().all():
            raise ValueError(f"{key} has values that are NaN or infinite; this file is damaged or its training failed")


def _reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The tensor in a shape that differs by no more than flattened kernels or sizes of 1 at the end; else None."""
    if tensor.shape == shape:
        return tensor
    if tensor.ndim < 2 or tensor.shape[0] != shape[0] or tensor.numel() != torch.Size(shape).numel():
        return None
    is_flat = tensor.ndim == 2
    has_ones_only = tensor.shape[1] == shape[1] and all(size == 1 for size in tensor.shape[2:])
    return tensor.reshape(shape) if is_flat or has_ones_only else None


def _fold(mid: Tensor, down: Tensor, kernel: list[int]) -> Tensor | None:
    """One convolution for two: mid (r, r, h, w) after down (r, in, 1, 1), worked out in float32 at least."""
    rank = down.shape[0]
    if list(mid.shape) != [rank, rank, *kernel] or down.numel() != rank * down.shape[1]:
        return None
    dtype = torch.promote_types(torch.float32, mid.dtype) if mid.dtype in _FLOATS else torch.float32
    core, first = mid.to(dtype), down.reshape(rank, -1).to(dtype)
    return torch.einsum("rshw,si->rihw", core, first).to(mid.dtype)


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
