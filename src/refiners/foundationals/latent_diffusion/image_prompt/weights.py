"""Files of IP-Adapters: what is in them, and bringing it into a projection and attentions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.foundationals.latent_diffusion.image_prompt.attention import DecoupledAttention
from refiners.foundationals.latent_diffusion.image_prompt.names import ip_adapter_names
from refiners.foundationals.latent_diffusion.image_prompt.projection import (
    FullImageProjection,
    ImageProjection,
    PerceiverResampler,
    ResamplerSpec,
)
from refiners.weights.formats import TEXT_FAMILIES
from refiners.weights.matching import match_all
from refiners.weights.tensors import read_tensors

Weights = Path | str | Mapping[str, Tensor]


def read_ip_adapter(weights: Weights, text_dim: int) -> tuple[Mapping[str, Tensor], str]:
    """The tensors of an IP-Adapter by the names in files, and what errors call them.

    Raises ValueError if they are of something else, or for UNets that read texts of another width.
    """
    if isinstance(weights, Mapping):
        tensors, where = weights, "the tensors of the IP-Adapter"
    else:
        tensors, where = read_tensors(weights), str(weights)
    widths = {tensor.shape[-1] for name, tensor in tensors.items() if name.startswith("ip_adapter.") and tensor.ndim}
    if not widths or not any(name.startswith("image_proj.") for name in tensors):
        raise ValueError(f"{where}: this is no IP-Adapter, which has tensors 'image_proj.…' and 'ip_adapter.…'")
    if text_dim not in widths:
        theirs, ours = (_family(width) for width in (min(widths), text_dim))
        raise ValueError(f"{where}: this IP-Adapter is for {theirs}, but the UNet is of {ours}: take the one for that")
    return tensors, where


def projection_for(tensors: Mapping[str, Tensor], where: str) -> fl.Chain:
    """A new projection of the kind and sizes of those tensors. Raises ValueError for kinds that there are not here."""
    prefix = "image_proj."
    shapes = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in tensors.items() if prefix in name}

    def sizes(name: str, count: int) -> tuple[int, ...]:
        shape = shapes.get(name)
        if shape is None or len(shape) != count or not all(shape):
            raise ValueError(f"{where}: {prefix + name!r} should have {count} sizes, but it is {shape or 'missing'}")
        return shape

    if "latents" in shapes:
        return PerceiverResampler(_resampler_spec(sizes, {name.split(".")[1] for name in shapes if "layers." in name}))
    if "proj.weight" in shapes:
        all_tokens, image_dim = sizes("proj.weight", 2)
        (text_dim,) = sizes("norm.weight", 1)
        return ImageProjection(image_dim, text_dim, all_tokens // text_dim)
    if "proj.3.weight" in shapes:
        text_dim, image_dim = sizes("proj.2.weight", 2)
        return FullImageProjection(image_dim, text_dim)
    raise ValueError(
        f"{where}: its projection is none of a plain, a full or a plus IP-Adapter; those that read the embeddings of "
        "faces (FaceID) do not load here"
    )


def _resampler_spec(sizes: Callable[[str, int], tuple[int, ...]], layers: set[str]) -> ResamplerSpec:
    _, num_tokens, inner_dim = sizes("latents", 3)
    return ResamplerSpec(
        image_dim=sizes("proj_in.weight", 2)[1],
        text_dim=sizes("proj_out.weight", 2)[0],
        inner_dim=inner_dim,
        num_tokens=num_tokens,
        num_layers=len(layers),
        num_heads=sizes("layers.0.0.to_q.weight", 2)[0] // ResamplerSpec.head_dim,
        feedforward_dim=sizes("layers.0.1.1.weight", 2)[0],
    )


def fill(
    projection: fl.Chain,
    attentions: Sequence[DecoupledAttention],
    tensors: Mapping[str, Tensor],
    device: torch.device | None,
    dtype: torch.dtype | None,
    where: str,
) -> None:
    """Give a projection and attentions their tensors. Raises ValueError, which names them, for what does not fit."""
    names = ip_adapter_names(projection, len(attentions))
    shapes = {name: tensor.shape for name, tensor in _own_tensors(projection, attentions).items()}
    matched = match_all(tensors, names, shapes, where)
    matched = {name: tensor.to(device=device, dtype=dtype) for name, tensor in matched.items()}
    for number, attention in enumerate(attentions, start=1):
        prefix = f"DecoupledAttention_{number}."
        own = {name.removeprefix(prefix): matched.pop(name) for name in list(matched) if name.startswith(prefix)}
        attention.image_attention.Parallel.load_state_dict(own, assign=True)
        attention.image_attention.scaling.to(device)
    projection.load_state_dict(matched, assign=True)


def named_tensors(projection: fl.Chain, attentions: Sequence[DecoupledAttention]) -> dict[str, Tensor]:
    """The tensors by the names in files; those of adapters on them are left out."""
    names = ip_adapter_names(projection, len(attentions))
    return {str(names.to_theirs(name)): tensor for name, tensor in _own_tensors(projection, attentions).items()}


def _own_tensors(projection: fl.Chain, attentions: Sequence[DecoupledAttention]) -> dict[str, Tensor]:
    tensors = _base_tensors(projection)
    for number, attention in enumerate(attentions, start=1):
        own = _base_tensors(attention.image_attention.Parallel)
        tensors |= {f"DecoupledAttention_{number}.{name}": tensor for name, tensor in own.items()}
    return tensors


def _base_tensors(chain: fl.Chain) -> dict[str, Tensor]:
    modules = cast("Iterator[tuple[str, nn.Module]]", chain.named_modules())
    of_adapters = tuple(f"{name}." for name, module in modules if getattr(module, "is_adapter", False))
    return {name: tensor for name, tensor in chain.state_dict().items() if not name.startswith(of_adapters)}


def _family(width: int) -> str:
    family = TEXT_FAMILIES.get(width)
    return f"{family} (texts {width} wide)" if family else f"a model with texts {width} wide"
