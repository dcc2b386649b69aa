"""Any number of weight updates of one layer as one LoRA, and as one full difference of what is no matrix."""

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from refiners.adapters.approximation import Limit, frobenius_norm, joined_factors, norm_of_product, spectrum_of
from refiners.adapters.delta import Delta
from refiners.adapters.deltas import make_delta
from refiners.adapters.difference import Difference
from refiners.adapters.embedding import EmbeddingLora
from refiners.foundationals.latent_diffusion.lora.export import in_dtype
from refiners.foundationals.latent_diffusion.lora.losses import LayerLoss
from refiners.foundationals.latent_diffusion.lora.places import Layer
from refiners.weights.lora_keys import Kind, LoraUpdate

Outcome = tuple[LoraUpdate | None, LayerLoss]  # None for an update that is not written

# Kinds that the weight of the layer counts for, and its bias.
_DEPENDENT = (Kind.DORA, Kind.WHOLE, Kind.GLORA, Kind.ELEMENTWISE_GLORA, Kind.IA3, Kind.OFT, Kind.BOFT)


def weighted_delta(layer: Layer, update: LoraUpdate, weight: float = 1.0) -> Delta:
    """The update of a file on its layer, in float32, with a scale."""
    parts = {part: tensor.float() if tensor.is_floating_point() else tensor for part, tensor in update.tensors.items()}
    return make_delta(layer.module, update.name, update.kind, parts, update.alpha, weight)


@torch.no_grad()
def reduced(
    layer: Layer, deltas: Sequence[Delta], limit: Limit | None, dtype: torch.dtype | None = None
) -> Iterator[Outcome]:
    """The sum of updates of a layer at their scales: a LoRA, and a full difference of what cannot be in one.

    limit: for the best LoRA within it, into which full differences of a linear layer or a convolution go as well; None
        for the LoRA whose rank is the sum of all, which has no loss.
    dtype: of the tensors; None for float32 or better.
    Raises ValueError if without a limit there is another kind of update, or if one needs the weights of the layer, and
    that is on the meta device.
    """
    weight, bias = base_of(layer, deltas)
    low_rank = [delta for delta in deltas if _is_for_lora(layer, delta, limit)]
    if low_rank:
        update, loss = _as_lora(layer, low_rank, weight, limit)
        yield in_dtype(update, dtype), loss
    total = sum_of([delta.delta_weight(weight) for delta in deltas if delta not in low_rank and has_weight(delta)])
    total_bias = sum_of([delta.delta_bias(weight, bias) for delta in deltas])
    parts = {part: tensor for part, tensor in (("weight", total), ("bias", total_bias)) if tensor is not None}
    if parts:
        kind = Kind.NORM if layer.place.layer == "norm" else Kind.DIFFERENCE
        norm = math.hypot(*map(frobenius_norm, parts.values()))
        whole = LoraUpdate(layer.place, layer.place.path, kind, parts)
        yield in_dtype(whole, dtype), LayerLoss(layer.place.path, kind, None, norm)


def base_of(layer: Layer, deltas: Sequence[Delta]) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that updates are of, in float32; zeros if they count for none of the kinds.

    Raises ValueError if they count and are on the meta device.
    """
    weight, bias = cast(Tensor, layer.module.weight), cast("Tensor | None", getattr(layer.module, "bias", None))
    dependent = next((delta.kind for delta in deltas if delta.kind in _DEPENDENT), None)
    if dependent is None:
        zero = torch.zeros((), device="cpu" if weight.is_meta else weight.device)
        return zero.expand(weight.shape), None if bias is None else zero.expand(bias.shape)
    if weight.is_meta:
        raise ValueError(
            f"the {dependent} of {layer.place.path} depends on the weights of the model, and this model has none: load "
            "the one that it was trained on"
        )
    return weight.detach().float(), None if bias is None else bias.detach().float()


def has_weight(delta: Delta) -> bool:
    """Whether an update is one of the weight; some are of the bias alone."""
    return not isinstance(delta, Difference) or delta.weight is not None


def sum_of(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of those that are there; None if none is."""
    found = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(found).sum(0) if found else None


def _is_for_lora(layer: Layer, delta: Delta, limit: Limit | None) -> bool:
    if not isinstance(delta, Difference):
        return True
    return limit is not None and has_weight(delta) and layer.place.layer in ("linear", "convolution")


def _as_lora(
    layer: Layer, deltas: Sequence[Delta], weight: Tensor, limit: Limit | None
) -> tuple[LoraUpdate, LayerLoss]:
    place = layer.place
    if limit is None:
        factors = joined_factors(deltas)
        if factors is None:
            kind = next(delta.kind for delta in deltas if joined_factors([delta]) is None)
            raise ValueError(f"the {kind} of {place.path} is no LoRA, so sums need a rank to approximate it with")
        (down, up), lost = factors, 0.0
        norm = norm_of_product(down, up)
    else:
        spectrum = spectrum_of(deltas, weight)
        rank = spectrum.rank_within(limit)
        (down, up), norm, lost = spectrum.factors(rank), spectrum.norm, spectrum.lost(rank)
    rank = len(down)
    kind = Kind.EMBEDDING if isinstance(deltas[0], EmbeddingLora) else Kind.LORA
    if kind is Kind.LORA:
        down = down.reshape(rank, *place.shape[1:])
        up = up.reshape(-1, rank, *[1] * len(place.shape[2:]))
    parts = {"down": down.float().contiguous(), "up": up.float().contiguous()}
    return LoraUpdate(place, place.path, kind, parts, float(rank), rank), LayerLoss(place.path, kind, rank, norm, lost)
