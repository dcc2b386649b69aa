"""Where peft means something else by a tensor than LyCORIS does by the one of the same name, there and back."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from refiners.weights.lora_keys.kinds import Kind
from refiners.weights.lora_keys.settings import CAYLEY_TERMS, Settings

PEFT_MAGNITUDE = "lora_magnitude_vector"


def as_of_lycoris(
    kind: Kind,
    parts: Mapping[str, Tensor],
    keys: Mapping[str, str],
    settings: Settings | None,
    name: str,
    alpha: float | None = None,
) -> dict[str, Tensor]:
    """The parts of an update that may be peft's, as LyCORIS means them.

    keys: of the parts, in the file. settings: None if there are none. name: of the layer. alpha: that of the file.
    Magnitudes of a convolution's outputs lie in the first dimension, not the second, and those of an embedding, which
    are of the entries of its vectors, in the second. The strength of a LoKr without any low-rank factor goes into w1;
    LyCORIS knows none in the files it reads, but trains with one if that is rank-stabilised, see `_strength_of_whole`.
    The singular values of an AdaLoRA go into the way down. OFT gets the number of terms of its series as one more part,
    if it is not the usual one, and turns no further than its settings allow. (IA)^3 is told whether it is on inputs.
    """
    found = dict(parts)
    if PEFT_MAGNITUDE in keys.get("magnitude", ""):
        is_row = kind is not Kind.EMBEDDING
        found["magnitude"] = rows(found["magnitude"]) if is_row else found["magnitude"].reshape(1, -1)
    if kind is Kind.ADALORA:
        found["down"] = found["down"] * found.pop("values").reshape(-1, *[1] * (found["down"].ndim - 1))
    if settings is None:
        return found
    if kind is Kind.LOKR and {"w1", "w2"} <= found.keys():
        strength = _strength_of_whole(settings, name, alpha)
        found["w1"] = found["w1"] if strength == 1 else found["w1"].float() * strength
    if kind is Kind.IA3 and settings.on_inputs and "l" in found and found["l"].ndim == 4:  # else its shape tells
        found["on_input"] = torch.tensor(int(name.endswith(settings.on_inputs)))
    if kind is Kind.OFT and settings.cayley_terms != CAYLEY_TERMS and found["blocks"].ndim == 2:
        found["terms"] = torch.tensor(settings.cayley_terms)
    if kind is Kind.OFT and settings.turn_limit is not None and found["blocks"].ndim == 2:
        found["blocks"] = _limited(found["blocks"], settings.turn_limit)
    return found


def _strength_of_whole(settings: Settings, name: str, alpha: float | None) -> float:
    """The strength of a LoKr of whole matrices: that of peft, by the settings, or of a rank-stabilised LyCORIS.

    LyCORIS gives such a one the rank for alpha, which makes it rank / √rank as strong, and writes rank * √rank.
    """
    rank = settings.rank_of(name)
    if rank:
        return settings.alpha_of(name, rank) / rank
    return abs(alpha) ** (1 / 3) if settings.is_rank_stabilised and alpha else 1.0


def _limited(blocks: Tensor, limit: float) -> Tensor:
    """Entries above the diagonals of skew matrices (n, entries); each matrix has a norm of at most limit / √n."""
    norms = (2 * blocks.float().square().sum(dim=1, keepdim=True)).sqrt()
    most = limit / math.sqrt(max(len(blocks), 1))
    return torch.where(norms <= most, blocks, (blocks.float() * (most / norms)).to(blocks.dtype))


def rows(magnitude: Tensor) -> Tensor:
    """Magnitudes of outputs with these in the first dimension: (out, 1, ...)."""
    return magnitude.reshape(-1, *[1] * (max(magnitude.ndim, 2) - 1))


def magnitude_of_peft(magnitude: Tensor, dimensions: int) -> Tensor:
    """Magnitudes of outputs as peft has them: (out,) of a linear layer, (1, out, 1, 1) of a convolution's weight."""
    return magnitude.flatten() if dimensions == 2 else magnitude.reshape(1, -1, *[1] * (dimensions - 2))
