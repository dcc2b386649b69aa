"""`Delta`: an update of one layer's weight, of whatever kind; LoRA, LoHa, LoKr, DoRA and the others are all of these.

An update takes a weight W to f(W). With scale s, the layer runs with W + s * (f(W) - W): 0 is off, 1 is as its maker
meant it. The updates of one layer are each worked out from the layer's own weight and then added, so that their order
does not count. Programs agree on scale 1; at others some of them scale inside f, and so differ from each other.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from refiners.adapters.layer_calls import call_layer
from refiners.fluxion.layers.module import Module, shell_copy
from refiners.weights.lora_keys.kinds import Kind

Scale = float | Sequence[float]


class Delta(Module, ABC):
    """An update of one layer.

    name: what tells it from others on the same layer.
    scale: how strong it is now: any finite number, or one for each sample of a batch. See `scale`.
    """

    is_printed_whole = True
    kind: ClassVar[Kind]
    # Whether `forward` works on what the layer returned.
    reads_output: bool = False

    _factor_dims: ClassVar[int] = 0  # of the factor at one scale
    factor: Tensor  # (), or (n,) for n samples; float32: a buffer, so that a new scale needs no new compilation

    def __init__(self, name: str, scale: Scale = 1.0) -> None:
        super().__init__()
        self.name = name
        self._scale = checked_scale(scale)
        self._has_one_scale = isinstance(self._scale, float)
        self._is_enabled = True
        self.register_buffer("factor", None, persistent=False)

    @classmethod
    @abstractmethod
    def from_parts(
        cls, layer: nn.Module, name: str, parts: Mapping[str, Tensor], alpha: float | None = None, scale: Scale = 1.0
    ) -> Self:
        """An update for `layer` of given tensors, which it takes as they are.

        parts: by the names that `refiners.weights.lora_keys` gives them. alpha: None if there is none.
        Raises ValueError, with the reason, if they do not fit the layer.
        """

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """The tensors as `from_parts` takes them."""

    @abstractmethod
    def misfit(self, layer: nn.Module) -> str | None:
        """Why this update cannot be added to `layer`, or None if it can."""

    def checked_for(self, layer: nn.Module) -> Self:
        """This update, if it can be added to `layer`. Raises ValueError, with the reason, if it cannot."""
        misfit = self.misfit(layer)
        if misfit is not None:
            raise ValueError(f"{self.kind} {self.name!r} does not fit: {misfit}")
        return self

    @abstractmethod
    def direction(self, weight: Tensor) -> Tensor | None:
        """f(W) - W without the factor, in the shape of `weight`; None if the weight stays as it is."""

    def bias_direction(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """What is added to the bias of a layer with this weight and bias, without the factor; None for nothing."""
        return None

    def delta_weight(self, weight: Tensor) -> Tensor:
        """The update of a layer's weight at the scale of now, in the shape of `weight`.

        Raises ValueError if the scale is one for each sample, as there is then no one weight.
        """
        direction = self.direction(weight)
        return torch.zeros_like(weight) if direction is None else direction * self._single_factor()

    def delta_bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The update of a layer's bias at the scale of now; None for none. Raises as `delta_weight`."""
        direction = self.bias_direction(weight, bias)
        return None if direction is None else direction * self._single_factor()

    def forward(self, x: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
        """What to add to `output`, which is what `layer`, without any update, returned for `x`."""
        weight = cast(Tensor, layer.weight)
        bias = self.bias_direction(weight, cast("Tensor | None", getattr(layer, "bias", None)))
        direction = self.direction(weight)
        if direction is None:
            assert bias is not None, "an update updates something"
            zero = torch.zeros_like(weight)
            return self.scaled(call_layer(layer, x, zero, bias.to(x.dtype)))
        kind = weight.dtype if x.dtype in (torch.int32, torch.int64) else x.dtype
        return self.scaled(call_layer(layer, x, direction.to(kind), None if bias is None else bias.to(kind)))

    def update(self, x: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
        """Call this module for what an adapter adds to `output`, which `layer` returned for `x`."""
        return self(x, output, layer)

    def scaled(self, update: Tensor) -> Tensor:
        """An update of a layer's output (B, ...) times the factor, each sample by its own if there are several."""
        factor = self.factor.to(update.dtype)
        return update * (factor if factor.ndim == 0 else for_batch(factor, update))

    @property
    def scale(self) -> float | tuple[float, ...]:
        """How strong the update is; 0 is off, 1 as its maker meant it.

        Several numbers are for the samples of a batch in turn. In a batch of a multiple of their number they start
        again after the last, as classifier-free guidance needs it, which has each sample twice.
        """
        return self._scale

    @scale.setter
    def scale(self, value: Scale) -> None:
        self._scale = checked_scale(value)
        self._has_one_scale = isinstance(self._scale, float)
        self._update_factor()

    @property
    def is_enabled(self) -> bool:
        """Whether the update is on. One that is off keeps its scale, and does nothing."""
        return self._is_enabled

    @is_enabled.setter
    def is_enabled(self, value: bool) -> None:
        self._is_enabled = value
        self._update_factor()

    @property
    def runs_as_weight(self) -> bool:
        """Whether `forward` calls the layer once more, with `direction` as its weight.

        An adapter spares that call by running the layer with the updated weight in the first place.
        """
        return True

    @property
    def has_one_scale(self) -> bool:
        """Whether all samples have the same scale."""
        return self._has_one_scale  # read at each call: a look at the scale would tie what was compiled to its value

    @property
    def gain(self) -> float:
        """What the factor is at scale 1."""
        return 1.0

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the tensors."""
        return next(self.parameters()).dtype

    def structural_copy(self) -> Self:
        """Return a copy with a scale of its own and the same tensors."""
        clone = shell_copy(self)
        clone._buffers["factor"] = self.factor.clone()
        return clone

    def _single_factor(self) -> Tensor:
        if not self.has_one_scale:
            raise ValueError(f"{self.name!r} has a scale for each of {len(self.factor)} samples, so no one weight")
        return self.factor

    @property
    def _strength(self) -> float | list[float]:
        """The number that `direction` is multiplied with, or one for each sample."""
        gain, scale = self.gain if self._is_enabled else 0.0, self._scale
        return [own * gain for own in scale] if isinstance(scale, tuple) else scale * gain

    def _factor(self, device: torch.device) -> Tensor:
        return torch.tensor(self._strength, dtype=torch.float32, device=device)

    def _update_factor(self) -> None:
        """Write the factor anew: in place where that can be done, so that what was compiled stays good."""
        strength = self._strength
        if isinstance(strength, float) and self.factor.ndim == self._factor_dims and not self.factor.is_inference():
            self.factor.fill_(strength)
            return
        factor = self._factor(self.factor.device)
        if self.factor.is_inference() or self.factor.shape != factor.shape:
            self._buffers["factor"] = factor
        else:
            self.factor.copy_(factor)

    def _make_numbers(self, device: torch.device | None = None) -> None:
        """Lay the numbers where the tensors lie, in float32 whatever the format of the tensors is."""
        self._buffers["factor"] = self._factor(device or self.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._make_numbers()
        return self

    def extra_repr(self) -> str:
        return f"{self.name!r}, scale={shown(self._scale)}"


class RankedDelta(Delta):
    """An update whose strength is scale * alpha / rank.

    alpha: how strong its maker meant it to be (saved with the tensors); the rank if not given.
    """

    alpha: Tensor  # () float32, saved

    def __init__(self, name: str, scale: Scale = 1.0, alpha: float | None = None) -> None:
        super().__init__(name, scale)
        self._given_alpha = None if alpha is None else _checked_number("alpha", alpha)
        self.register_buffer("alpha", None)

    @property
    @abstractmethod
    def rank(self) -> int:
        """How many dimensions the update goes through."""

    @property
    def _alpha(self) -> float:
        return float(self.rank) if self._given_alpha is None else self._given_alpha

    @property
    def gain(self) -> float:
        """The alpha over the rank."""
        return self._alpha / self.rank

    def set_alpha(self, alpha: float) -> None:
        """Set how strong the maker of the update meant it to be. What was compiled stays good."""
        self.set_strength(alpha, self._scale)

    def set_strength(self, alpha: float, scale: Scale) -> None:
        """Set both the alpha and the scale, for the cost of one. What was compiled stays good."""
        given, self._scale = _checked_number("alpha", alpha), checked_scale(scale)
        self._given_alpha = given
        self._has_one_scale = isinstance(self._scale, float)
        self.alpha.fill_(given)
        self._update_factor()

    def _make_numbers(self, device: torch.device | None = None) -> None:
        self._buffers["alpha"] = torch.tensor(self._alpha, dtype=torch.float32, device=device or self.device)
        super()._make_numbers(device)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.alpha.is_meta:
            self._given_alpha = _checked_number("alpha", self.alpha.item())
            self._make_numbers(self.alpha.device)

    def extra_repr(self) -> str:
        return f"{self.name!r}, rank={self.rank}, alpha={self._alpha:g}, scale={shown(self._scale)}"


def shown(scale: float | tuple[float, ...]) -> str:
    """A scale in short: "0.5", or "0, 0.5, 1" for several samples."""
    return f"{scale:g}" if isinstance(scale, int | float) else ", ".join(f"{value:g}" for value in scale)


def repeated(factor: Tensor, batch_size: int) -> Tensor:
    """Factors (n, ...) of samples in turn, for a whole batch. Raises ValueError if it is no multiple of n."""
    count = factor.shape[0]
    if batch_size % count:
        raise ValueError(f"there are scales for {count} samples, but the batch has {batch_size}: set one for each")
    return factor.repeat(batch_size // count, *[1] * (factor.ndim - 1)) if batch_size != count else factor


def for_batch(factor: Tensor, update: Tensor) -> Tensor:
    """Factors (n,) of samples in turn, to be multiplied with (B, ...). Raises ValueError as `repeated`."""
    return repeated(factor, update.shape[0]).view(-1, *[1] * (update.ndim - 1))


def checked_scale(scale: Scale) -> float | tuple[float, ...]:
    """The scale as it is kept; numbers may be those of numpy and torch.

    Raises TypeError if it is no number and no sequence of numbers, ValueError if one is not finite, or there is none.
    """
    given = cast(object, scale.tolist() if isinstance(scale, Tensor) else scale)
    if isinstance(given, Real):
        return _checked_number("scale", float(given))
    values = [] if isinstance(given, str) or not isinstance(given, Iterable) else list(cast("Iterable[object]", given))
    numbers = [float(value) for value in values if isinstance(value, Real)]
    if isinstance(given, str) or not isinstance(given, Iterable) or len(numbers) != len(values):
        raise TypeError(f"a scale is a number, or one for each sample of the batch, not {given!r:.80}")
    if not numbers:
        raise ValueError("there are no scales: give a number, or one for each sample of the batch")
    return tuple(_checked_number("scale", number) for number in numbers)


def _checked_number(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"the {name} of an adapter must be a finite number, not {value}")
    return float(value)
