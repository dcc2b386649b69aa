"""Which class makes which kind of weight update."""

from collections.abc import Mapping

from torch import Tensor, nn

from refiners.adapters.delta import Delta, Scale
from refiners.adapters.difference import Difference
from refiners.adapters.embedding import EmbeddingLora
from refiners.adapters.low_rank import Conv2dLora, LinearLora
from refiners.weights.lora_keys.kinds import Kind

_CLASSES: dict[Kind, type[Delta]] = {
    Kind.DIFFERENCE: Difference,
    Kind.NORM: Difference,
    Kind.EMBEDDING: EmbeddingLora,
}


def make_delta(
    layer: nn.Module,
    name: str,
    kind: Kind,
    parts: Mapping[str, Tensor],
    alpha: float | None = None,
    scale: Scale = 1.0,
) -> Delta:
    """An update for `layer` of the tensors of a file, which it takes as they are.

    parts: by the names that `refiners.weights.lora_keys` gives them.
    Raises ValueError, with the reason, if they do not fit the layer or the kind is one that there is no class for.
    """
    return _class_of(layer, kind).from_parts(layer, name, parts, alpha, scale)


def kind_of_parts(delta: Delta) -> Kind:
    """The kind that makes `delta` again from its parts: that of its direction, if it is a DoRA."""
    inner = getattr(delta, "inner", None)
    return inner.kind if isinstance(inner, Delta) else delta.kind


def _class_of(layer: nn.Module, kind: Kind) -> type[Delta]:
    if kind is Kind.LORA:
        return Conv2dLora if isinstance(layer, nn.Conv2d) else LinearLora
    if kind not in _CLASSES:
        raise ValueError(f"{kind} is a kind of update that cannot be used")
    return _CLASSES[kind]
