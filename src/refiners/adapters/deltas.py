"""Which class makes which kind of weight update."""

from collections.abc import Mapping

from torch import Tensor, nn

from refiners.adapters.delta import Delta, Scale
from refiners.adapters.difference import Difference, Replacement
from refiners.adapters.dora import Dora
from refiners.adapters.elementwise_glora import ElementwiseGlora
from refiners.adapters.embedding import EmbeddingLora
from refiners.adapters.glora import Glora
from refiners.adapters.ia3 import Ia3
from refiners.adapters.loha import Loha
from refiners.adapters.lokr import Lokr
from refiners.adapters.lora import lora_class
from refiners.adapters.orthogonal import Boft, rotation_class
from refiners.weights.lora_keys.kinds import Kind

_CLASSES: dict[Kind, type[Delta]] = {
    Kind.DIFFERENCE: Difference,
    Kind.NORM: Difference,
    Kind.WHOLE: Replacement,
    Kind.EMBEDDING: EmbeddingLora,
    Kind.LOHA: Loha,
    Kind.LOKR: Lokr,
    Kind.DORA: Dora,
    Kind.GLORA: Glora,
    Kind.ELEMENTWISE_GLORA: ElementwiseGlora,
    Kind.IA3: Ia3,
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

    parts: by the names that `refiners.weights.lora_keys` gives them. If "magnitude" is among them, it is a DoRA of an
        update of this kind.
    Raises ValueError, with the reason, if they do not fit the layer or the kind is one that there is no class for.
    """
    if kind in (Kind.OFT, Kind.BOFT):
        return rotation_class(name, parts).from_parts(layer, name, parts, alpha, scale)
    if "magnitude" in parts and kind is not Kind.DORA:
        others = {part: tensor for part, tensor in parts.items() if part != "magnitude"}
        return Dora(make_delta(layer, name, kind, others, alpha), parts["magnitude"], scale).checked_for(layer)
    return _class_of(layer, kind).from_parts(layer, name, parts, alpha, scale)


def kind_of_parts(delta: Delta) -> Kind:
    """The kind that makes `delta` again from its parts: that of its direction, if it is a DoRA."""
    if isinstance(delta, Boft):
        return Kind.OFT  # LyCORIS calls the parts of both the same
    inner = getattr(delta, "inner", None)
    return inner.kind if isinstance(inner, Delta) else delta.kind


def _class_of(layer: nn.Module, kind: Kind) -> type[Delta]:
    if kind is Kind.LORA:
        return lora_class(layer)
    if kind not in _CLASSES:
        raise ValueError(f"{kind} is a kind of update that cannot be used")
    return _CLASSES[kind]
