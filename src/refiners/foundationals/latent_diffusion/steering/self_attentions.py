"""Where the picture attends to itself in a UNet: the places that most edits of sampling go to."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

import refiners.fluxion.layers as fl
from refiners.foundationals.latent_diffusion.unet import UNet
from refiners.foundationals.latent_diffusion.unet_names import diffusers_names


@dataclass(frozen=True)
class Place:
    """A self-attention of a UNet.

    name: what diffusers calls it, as in `mid_block.attentions.0.transformer_blocks.0.attn1`.
    product: what takes its queries, keys and values.
    """

    name: str
    attention: fl.SelfAttention
    product: fl.ScaledDotProductAttention


def self_attentions(unet: UNet, patterns: str | Sequence[str] = "") -> list[Place]:
    """The self-attentions whose name has a match of one of the regular expressions, in the order of the tree.

    Raises ValueError for no patterns, and for one that is no regular expression or matches none.
    """
    names = diffusers_names(unet.spec)
    places: list[Place] = []
    modules = cast("Iterator[tuple[str, nn.Module]]", unet.named_modules())
    for path, module in modules:
        if not isinstance(module, fl.SelfAttention):
            continue
        _, name = names.find(f"{path}.Linear.weight", is_to_theirs=True)
        if name:  # others belong to an adapter
            product = module.ensure_find(fl.ScaledDotProductAttention)
            places.append(Place(name.removesuffix(".to_out.0.weight"), module, product))
    chosen: list[Place] = []
    several = [patterns] if isinstance(patterns, str) else patterns
    if not several:
        raise ValueError("there are no patterns of self-attentions: give at least one, such as 'mid'")
    for pattern in several:
        found = [place for place in places if _searched(pattern, place.name)]
        if not found:
            known = ", ".join(place.name for place in places)
            raise ValueError(f"{pattern!r} matches no self-attention of this UNet; it has {known or 'none'}")
        chosen += found
    return [place for place in places if place in chosen]


def _searched(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
