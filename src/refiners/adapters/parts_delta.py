"""`PartsDelta`: what updates have in common whose parts are parameters of their own, for weights of one shape."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from refiners.adapters.delta import Delta


class PartsDelta(Delta):
    """An update of a linear layer or a convolution whose parts are parameters, or None, under their own names."""

    part_names: ClassVar[tuple[str, ...]]

    shape: torch.Size  # of the weight: (out, in), or (out, in / groups, height, width)

    def parts(self) -> dict[str, Tensor]:
        """The tensors by name, as `from_parts` takes them."""
        found = {part: cast("Tensor | None", getattr(self, part)) for part in self.part_names}
        return {part: tensor for part, tensor in found.items() if tensor is not None}

    def misfit(self, layer: nn.Module) -> str | None:
        """Why this update cannot be added to `layer`, or None if it can."""
        try:
            theirs = _weight_shape(layer)
        except ValueError as error:
            return str(error)
        if theirs == self.shape:
            return None
        return f"it is for weights of shape {tuple(self.shape)}, that of the layer has {tuple(theirs)}"

    def _take_parts(self, layer: nn.Module, parts: Mapping[str, Tensor]) -> None:
        """Make parameters of these tensors. Raises ValueError, with the reason, if they do not fit the layer."""
        self.shape = _weight_shape(layer)
        for part in self.part_names:
            tensor = parts.get(part)
            self.register_parameter(part, None if tensor is None else nn.Parameter(tensor.detach()))
        problem = _unknown(parts, self.part_names) or self._problem()
        if problem is not None:
            raise ValueError(f"{self.kind} {self.name!r} does not fit: {problem}")

    @abstractmethod
    def _problem(self) -> str | None:
        """Why these parts are no update of weights of `shape`, or None if they are."""

    def _shape_problem(self, expected: Mapping[str, tuple[int, ...]]) -> str | None:
        """What is missing, or is not of the shape that is expected; None if all is."""
        for part, shape in expected.items():
            tensor = cast("Tensor | None", getattr(self, part))
            if tensor is None:
                return f"its {part} is missing"
            if tensor.shape != shape:
                weight = tuple(self.shape)
                return f"its {part} has shape {tuple(tensor.shape)}, for a weight of {weight} it should be {shape}"
        return None

    def _as(self, dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """These tensors in a number format that holds both theirs and `dtype`."""
        kind = torch.promote_types(self.dtype, dtype)
        return tuple(tensor.to(kind) for tensor in tensors if tensor is not None)


def _weight_shape(layer: nn.Module) -> torch.Size:
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise ValueError(f"it updates a linear layer or a convolution, not a {type(layer).__name__}")
    return layer.weight.shape


def _unknown(parts: Mapping[str, Tensor], known: tuple[str, ...]) -> str | None:
    unknown = [part for part in parts if part not in known]
    return f"it has a part {unknown[0]!r}, and there are: {', '.join(known)}" if unknown else None
