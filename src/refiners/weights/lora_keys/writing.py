"""From the updates of layers to the tensors and metadata of a file, in the formats of others."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from refiners.weights.files import write_safetensors
from refiners.weights.lora_keys.kinds import Kind, key_end
from refiners.weights.lora_keys.peft_parts import PEFT_MAGNITUDE, magnitude_of_peft
from refiners.weights.lora_keys.reading import COMPONENT_FOLDERS, PEFT_SETTINGS, PEFT_WEIGHTS
from refiners.weights.lora_keys.settings import METADATA_KEY
from refiners.weights.lora_keys.updates import LoraUpdate

LoraFormat = Literal["kohya", "diffusers", "peft"]
Number = TypeVar("Number", int, float)
_PEFT_PARTS = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": PEFT_MAGNITUDE}


def check_format(name: str) -> LoraFormat:
    """Raises ValueError if we write no format of this name."""
    for known in get_args(LoraFormat):
        if name == known:
            return known
    raise ValueError(f"there is no LoRA format {name!r} to write; there are: {', '.join(get_args(LoraFormat))}")


def format_updates(updates: Sequence[LoraUpdate], form: LoraFormat) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Name the tensors of updates, and say the rest in metadata.

    kohya: `lora_unet_….lora_down.weight`, `.lora_up.weight` and `.alpha`, as web UIs and ComfyUI read it too; other
        kinds of updates as LyCORIS names them.
    diffusers: `unet.….lora_A.weight`, alphas in the metadata; what `load_lora_weights` takes.
    peft: the same with peft's `base_model.model.` in between; `save_updates` makes a folder per component of it.
    Raises ValueError if the format has no place for an update.
    """
    tensors: dict[str, Tensor] = {}
    for update in updates:
        name = update.place.flat_name
        if form != "kohya":
            _check_is_low_rank(update, form)
            name = update.place.dotted_name if form == "diffusers" else _peft_name(update)
        for part, tensor in update.tensors.items():
            end = _end_of(update.kind, part) if form == "kohya" else _PEFT_PARTS[part]
            if part == "magnitude" and form != "kohya":
                tensor = magnitude_of_peft(tensor, len(update.place.shape))
            tensors[f"{name}.{end}"] = tensor.detach()
        if form == "kohya" and update.alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(update.alpha, dtype=torch.float32)
    return tensors, _kohya_metadata(updates) if form == "kohya" else {"format": "pt", METADATA_KEY: _settings(updates)}


def _end_of(kind: Kind, part: str) -> str:
    return key_end(Kind.DORA if part == "magnitude" else kind, part)


def _check_is_low_rank(update: LoraUpdate, form: str) -> None:
    """Raises ValueError if peft's formats have no place for an update."""
    magnitude = update.tensors.get("magnitude")
    reason = None
    if update.kind is not Kind.LORA:
        reason = f"is a {update.shown_kind}"
    elif "mid" in update.tensors:
        reason = "has the core of a Tucker decomposition"
    elif magnitude is not None and magnitude.shape[:1] != update.place.shape[:1]:
        reason = "is a DoRA with a magnitude for each input"
    if reason:
        raise ValueError(
            f"the update of {update.place.path} {reason}, which is not written in the form of {form}: write kohya's"
        )


def save_updates(path: Path | str, updates: Sequence[LoraUpdate], form: LoraFormat) -> None:
    """Write updates: one safetensors file, or for peft a folder (per component, if there are several).

    Adapters of peft that lie in that folder from before are replaced, also those that have another place in it.
    """
    tensors, metadata = format_updates(updates, form)
    if form != "peft":
        write_safetensors(path, tensors, metadata)
        return
    by_component: dict[str, list[LoraUpdate]] = {}
    for update in updates:
        by_component.setdefault(_prefix(update), []).append(update)
    folders = {prefix: Path(path) / prefix if len(by_component) > 1 else Path(path) for prefix in by_component}
    for stale in {Path(path), *(Path(path) / name for name in COMPONENT_FOLDERS)} - set(folders.values()):
        for name in (PEFT_SETTINGS, *PEFT_WEIGHTS):
            (stale / name).unlink(missing_ok=True)
    for prefix, group in by_component.items():
        folder = folders[prefix]
        folder.mkdir(parents=True, exist_ok=True)
        own = {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}
        write_safetensors(folder / PEFT_WEIGHTS[0], own, {"format": "pt"})
        (folder / PEFT_SETTINGS).write_text(json.dumps(_peft_settings(group), indent=2) + "\n")


def _prefix(update: LoraUpdate) -> str:
    return update.place.component.dotted[0].removesuffix(".")


def _peft_name(update: LoraUpdate) -> str:
    return f"{update.place.component.dotted[0]}{update.place.peft_name}"


def _kohya_metadata(updates: Iterable[LoraUpdate]) -> dict[str, str]:
    ranks = {update.rank for update in updates if update.rank is not None}
    alphas = {update.alpha for update in updates if update.alpha is not None}
    is_plain = all(update.kind is Kind.LORA and "magnitude" not in update.tensors for update in updates)
    return {
        "format": "pt",
        "ss_network_module": "networks.lora" if is_plain else "lycoris.kohya",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():.9g}" if len(alphas) == 1 else "Dynamic",
    }


def _settings(updates: Iterable[LoraUpdate]) -> str:
    by_component: dict[str, list[LoraUpdate]] = {}
    for update in updates:
        by_component.setdefault(_prefix(update), []).append(update)
    settings = {
        f"{prefix}.{name}": value
        for prefix, group in by_component.items()
        for name, value in _peft_settings(group).items()
    }
    return json.dumps(settings, sort_keys=True)


def _peft_settings(updates: Sequence[LoraUpdate]) -> dict[str, object]:
    """The settings of peft's `LoraConfig` for these updates of one component: the most usual rank, and what differs."""
    names = [update.place.names[0].removeprefix(update.place.component.hidden) for update in updates]
    ranks: Mapping[str, int] = {name: update.rank or 0 for name, update in zip(names, updates, strict=True)}
    alphas: Mapping[str, float] = {
        name: ranks[name] if update.alpha is None else update.alpha for name, update in zip(names, updates, strict=True)
    }
    rank, alpha = _most_usual(ranks.values()), _most_usual(alphas.values())
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(names),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": any("magnitude" in update.tensors for update in updates),
    }


def _most_usual(values: Iterable[Number]) -> Number:
    return Counter(values).most_common(1)[0][0]
