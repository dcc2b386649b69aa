"""From pictures to what ControlNets and T2I-Adapters are led by: line drawings and edges."""

from refiners.foundationals.preprocessors.canny import canny_edges
from refiners.foundationals.preprocessors.informative_drawings import (
    DrawingSpec,
    InformativeDrawings,
    load_informative_drawings,
)

__all__ = ["DrawingSpec", "InformativeDrawings", "canny_edges", "load_informative_drawings"]
