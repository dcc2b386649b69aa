"""The cross-attentions of a UNet, in the order in which files of IP-Adapters number them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import nn

import refiners.fluxion.layers as fl
from refiners.foundationals.latent_diffusion import unet_names
from refiners.foundationals.latent_diffusion.unet import UNet
from refiners.weights.lora_keys import UNET, Place

_PARTS = ("down_blocks", "up_blocks", "mid_block")  # diffusers' UNet has its middle last


@dataclass(frozen=True)
class CrossAttention:
    """An attention over the text, and where it sits; the first of the names of that is diffusers'."""

    place: Place
    layer: fl.Attention


def find_cross_attentions(unet: UNet) -> list[CrossAttention]:
    """The attentions over the text, in diffusers' order; those of adapters in the tree are none of the UNet's."""
    rules = unet_names.diffusers_names(unet.spec), unet_names.single_file_names(unet.spec)
    found: list[CrossAttention] = []
    for path, module in cast("Iterator[tuple[str, nn.Module]]", unet.named_modules()):
        if isinstance(module, fl.Attention) and not isinstance(module, fl.SelfAttention):
            projections = [names.find(f"{path}.Linear", is_to_theirs=True)[1] for names in rules]
            names = tuple(name.removesuffix(".to_out.0") for name in projections if name)
            if names:
                found.append(CrossAttention(Place(UNET, f"unet.{path}", "attention", (), names), module))
    return sorted(found, key=_number)


def _number(attention: CrossAttention) -> tuple[int, ...]:
    part, *words = attention.place.names[0].split(".")
    return _PARTS.index(part), *(int(word) for word in words if word.isdigit())
