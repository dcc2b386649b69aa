"""From the updates of layers to the tensors and metadata of a file, in the formats of others."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from refiners.weights.files import write_safetensors
from refiners.weights.lora_keys.kinds import Kind, key_end
from refiners.weights.lora_keys.peft_forms import peft_settings, peft_tensors
from refiners.weights.lora_keys.reading import COMPONENT_FOLDERS, PEFT_SETTINGS, PEFT_WEIGHTS
from refiners.weights.lora_keys.settings import METADATA_KEY
from refiners.weights.lora_keys.updates import LoraUpdate

LoraFormat = Literal["kohya", "diffusers", "peft"]


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
    if form == "kohya":
        return _kohya_tensors(updates), _kohya_metadata(updates)
    tensors: dict[str, Tensor] = {}
    for update in updates:
        if form == "diffusers":
            _check_is_low_rank(update)
        name = update.place.dotted_name if form == "diffusers" else _peft_path(update)
        tensors |= {f"{name}.{end}": tensor.detach() for end, tensor in peft_tensors(update).items()}
    return tensors, {"format": "pt", METADATA_KEY: _settings(updates)}


def _kohya_tensors(updates: Iterable[LoraUpdate]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for update in updates:
        name = update.place.flat_name
        if update.kind is Kind.WHOLE:
            raise ValueError(
                f"{update.place.path} has a whole weight or bias, and files hold differences: put these updates on "
                "their model, and save them from it"
            )
        for part, tensor in update.tensors.items():
            kind = Kind.DORA if part == "magnitude" else update.kind
            tensors[f"{name}.{key_end(kind, part)}"] = tensor.detach()
        if update.alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(update.alpha, dtype=torch.float32)
    return tensors


def _check_is_low_rank(update: LoraUpdate) -> None:
    """Raises ValueError if diffusers does not load such an update."""
    if update.kind is not Kind.LORA:
        raise ValueError(
            f"the update of {update.place.path} is {update.shown_kind.with_article}, and diffusers loads LoRA and DoRA "
            "only: write kohya's form, or a folder for peft"
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
        (folder / PEFT_SETTINGS).write_text(json.dumps(peft_settings(group), indent=2) + "\n")


def _prefix(update: LoraUpdate) -> str:
    return update.place.component.dotted[0].removesuffix(".")


def _peft_path(update: LoraUpdate) -> str:
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
        for name, value in peft_settings(group).items()
    }
    return json.dumps(settings, sort_keys=True)
