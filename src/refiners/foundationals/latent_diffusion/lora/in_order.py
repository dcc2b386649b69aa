"""LoRA files of the first Refiners: tensors `unet.000`, `unet.001`, …, whose layers only their order tells.

Each layer has two tensors, the way up and then the way down. The header says below which classes of that time the
linear layers were adapted, in the order of the tree; the trees of today have them in the same order.
"""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.foundationals.clip import text_encoder
from refiners.foundationals.latent_diffusion import unet
from refiners.foundationals.latent_diffusion.lora.places import Layer, Patchable
from refiners.weights.lora_keys import Kind, LoraFile, LoraUpdate, Place

_KEY = re.compile(r"(unet|text_encoder|lda)\.(\d{3,6})")
# What that time's classes are called today; "self" is the whole tree.
_CLASSES: dict[str, type[fl.Module]] = {
    "Attention": fl.Attention,
    "SelfAttention": fl.SelfAttention,
    "CrossAttentionBlock": unet.TransformerLayer,
    "CrossAttentionBlock2d": unet.SpatialTransformer,
    "TransformerLayer": text_encoder.TransformerLayer,
}


def is_in_order(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file is of this kind."""
    return any(_KEY.fullmatch(key) for key in tensors)


def updates_in_order(file: LoraFile, model: Patchable, layers: Mapping[str, Layer]) -> tuple[LoraUpdate, ...]:
    """Pair tensors and layers. Raises ValueError if the header does not say of which, or if there are not as many."""
    strange = [key for key in file.tensors if not _KEY.fullmatch(key) or key.startswith("lda.")]
    if strange:
        raise ValueError(
            f"{file.path}: {strange[0]!r} has no place in this model; of LoRA files whose layers have only "
            "numbers, just unet.000, … and text_encoder.000, … can be used"
        )
    places = {id(layer.module): layer.place for layer in layers.values()}
    updates: list[LoraUpdate] = []
    for prefix, tree in (("unet", model.unet), ("text_encoder", model.clip_text_encoder)):
        keys = sorted((key for key in file.tensors if key.startswith(f"{prefix}.")), key=_number)
        if keys:
            targets = list(_targets(file, prefix, tree, places))
            if len(keys) != 2 * len(targets):
                raise ValueError(
                    f"{file.path}: {len(keys)} tensors {prefix}.…, but the {len(targets)} layers that its header "
                    "names take two each; the file is of another model, or not complete"
                )
            pairs = zip(keys[::2], keys[1::2], strict=True)
            updates += [_update(file, *pair, place) for pair, place in zip(pairs, targets, strict=True)]
    return tuple(updates)


def _number(key: str) -> int:
    return int(key.rpartition(".")[2])


def _targets(file: LoraFile, prefix: str, tree: fl.Chain, places: Mapping[int, Place]) -> Iterator[Place]:
    named = file.metadata.get(f"{prefix}_targets")
    if not named:
        raise ValueError(f"{file.path}: its layers have only numbers, and its header has no {prefix}_targets to tell")
    names = named.split(",")
    if len(names) > len(_CLASSES) + 1:
        raise ValueError(f"{file.path}: {prefix}_targets names {len(names)} classes, but {len(_CLASSES) + 1} are known")
    for name in names:
        if name != "self" and name not in _CLASSES:
            known = ", ".join(["self", *_CLASSES])
            raise ValueError(f"{file.path}: {prefix}_targets names {name!r:.80}, but known are {known}")
        roots = [tree] if name == "self" else list(tree.layers(_CLASSES[name]))
        for root in roots:
            yield from (places[id(linear)] for linear, _ in root.walk(nn.Linear) if id(linear) in places)


def _update(file: LoraFile, first: str, second: str, place: Place) -> LoraUpdate:
    up, down = file.tensors[first], file.tensors[second]
    if up.shape[:1] != place.shape[:1] and down.shape[:1] == place.shape[:1]:  # some files have them the other way
        up, down = down, up
    rank = down.shape[0] if down.ndim else 0
    return LoraUpdate(place, first, Kind.LORA, {"down": down, "up": up}, float(rank), rank)
