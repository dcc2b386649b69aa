"""Low-rank maps x -> scale * (alpha / rank) * up(down(x)) (arXiv 2106.09685, section 4.1), of features or channels."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refiners.adapters.delta import RankedDelta, Scale, repeated
from refiners.fluxion.layers.conv import Conv2d, IntPair, PaddingMode
from refiners.fluxion.layers.linear import Linear
from refiners.fluxion.layers.module import WeightedModule
from refiners.weights.lora_keys.kinds import Kind

Map = TypeVar("Map", bound=WeightedModule)


class Lora(RankedDelta, ABC, Generic[Map]):
    """A low-rank map up(down(x)), times scale * alpha / rank. Starts as zero: `down` is random, `up` is zero.

    name: what tells it from others on the same layer.
    scale: how strong it is now; alpha: how strong its maker meant it to be (saved with the weights), rank if not given.
    """

    kind = Kind.LORA
    _trailing: tuple[int, ...] = ()  # sizes of 1 that spread `factor` over the dimensions behind the channels
    down: Map
    up: Map
    factor: Tensor  # (rank,), or (n, rank) for n samples

    def __init__(self, name: str, down: Map, up: Map, scale: Scale, alpha: float | None) -> None:
        super().__init__(name, scale, alpha)
        self.down = down
        self.up = up
        self._make_numbers()
        if not self.down.weight.is_meta:  # weights that come later need no start, and torch is slow to give none
            nn.init.normal_(self.down.weight, std=1 / self.rank)
            nn.init.zeros_(self.up.weight)

    @property
    def runs_as_weight(self) -> bool:
        """Two small products take less than one with the whole weight."""
        return False

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.down.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the weights."""
        return self.down.weight.dtype

    @classmethod
    def can_stack(cls, loras: "Sequence[Lora[Any]]") -> bool:
        """Whether these maps, all of this class, can run as one whose rank is the sum of theirs."""
        return True

    def factors(self) -> tuple[Tensor, Tensor]:
        """The weights of the way down (rank, in, ...) and up (out, rank, ...), as they run."""
        return _weight(self, "down"), _weight(self, "up")

    def _factors_for(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The factors in a number format that holds both theirs and that of a layer's weight."""
        down, up = self.factors()
        dtype = torch.promote_types(weight.dtype, down.dtype)
        return down.to(dtype), up.to(dtype)

    @abstractmethod
    def add_to(self, base: Tensor, x: Tensor, down: Tensor, up: Tensor, factor: Tensor) -> Tensor:
        """The sum of `base` and the update of `x` by these weights: its own, or those of several maps as of one.

        down (R, ...), up (out, R, ...) and factor (R,) or (B, R), for R the sum of the ranks and B samples.
        """

    @abstractmethod
    def is_update_of(self, layer: nn.Module) -> bool:
        """Whether `layer` does nothing but map by its weight, and this map is the same as a part of that."""

    def added_to_weight(self, weight: Tensor, down: Tensor, up: Tensor, factor: Tensor) -> Tensor:
        """The sum of a layer's weight and the update by weights as `add_to` takes them, with factor (R,)."""
        return torch.addmm(weight.flatten(1), up.flatten(1) * factor, down.flatten(1)).view_as(weight)

    def update(self, x: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
        """As in `Delta`; a LoRA needs neither the layer nor its output."""
        return self(x)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # see `update`
        h = self.down(x.to(self.dtype) if needs_cast(x, self.dtype) else x)
        return self.up(h * self._spread(self.factor.to(h.dtype), h)).to(x.dtype)

    def load_weights(self, down_weight: Tensor, up_weight: Tensor, alpha: float | None = None) -> None:
        """Copy weights of the same shapes into this map, in place. Raises ValueError if a shape differs."""
        self._check_shapes(down=down_weight, up=up_weight)
        with torch.no_grad():
            self.down.weight.copy_(down_weight)
            self.up.weight.copy_(up_weight)
        if alpha is not None:
            self.set_alpha(alpha)

    def parts(self) -> dict[str, Tensor]:
        """As `from_parts` takes them: "down" (rank, in, ...) and "up" (out, rank, ...)."""
        return {"down": self.down.weight, "up": self.up.weight}

    def _check_shapes(self, **weights: Tensor) -> None:
        """Raises ValueError if weights, by part, are not of the shapes of those here."""
        for part, weight in weights.items():
            ours, theirs = tuple(_weight(self, part).shape), tuple(weight.shape)
            if ours != theirs:
                raise ValueError(f"LoRA {self.name!r}: the {part} weight has shape {theirs}, this one needs {ours}")

    def _spread(self, factor: Tensor, h: Tensor) -> Tensor:
        """Factors in a shape that multiplies h (B, ..., rank), or (B, rank, H, W) of a convolution."""
        if factor.ndim == 1:
            return factor.view(-1, *self._trailing)
        middle = [1] * (h.ndim - 2 - len(self._trailing))
        return repeated(factor, h.shape[0]).view(h.shape[0], *middle, -1, *self._trailing)

    def _factor(self, device: torch.device) -> Tensor:
        return super()._factor(device).unsqueeze(-1).repeat_interleave(self.rank, -1)

    def _single_factor(self) -> Tensor:
        return super()._single_factor()[0]


class LinearLora(Lora[Linear]):
    """A low-rank update of a linear layer: (..., in_features) to (..., out_features)."""

    def __init__(
        self,
        name: str,
        /,
        in_features: int,
        out_features: int,
        rank: int = 16,
        scale: Scale = 1.0,
        alpha: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_rank(rank)
        down = Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        up = Linear(rank, out_features, bias=False, device=device, dtype=dtype)
        super().__init__(name, down, up, scale, alpha)

    @classmethod
    def from_weights(
        cls, name: str, /, down: Tensor, up: Tensor, scale: Scale = 1.0, alpha: float | None = None
    ) -> Self:
        """A LoRA of given weights, down (rank, in_features) and up (out_features, rank), which it takes as they are."""
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise ValueError(f"LoRA {name!r}: down {tuple(down.shape)} and up {tuple(up.shape)} do not share a rank")
        lora = cls(name, down.shape[1], up.shape[0], down.shape[0], scale, alpha, device="meta", dtype=down.dtype)
        return _with_weights(lora, down, up)

    @property
    def rank(self) -> int:
        """How many dimensions the map goes through."""
        return self.down.out_features

    @property
    def in_features(self) -> int:
        """Size of the last dimension of the input."""
        return self.down.in_features

    @property
    def out_features(self) -> int:
        """Size of the last dimension of the output."""
        return self.up.out_features

    def misfit(self, layer: nn.Module) -> str | None:
        """Why this map cannot be added to `layer`, or None if it can."""
        if not isinstance(layer, nn.Linear):
            return f"it updates a linear layer, not a {type(layer).__name__}"
        ours, theirs = (self.in_features, self.out_features), (layer.in_features, layer.out_features)
        if ours == theirs:
            return None
        return f"it maps {ours[0]} to {ours[1]} features, the layer {theirs[0]} to {theirs[1]}"

    @classmethod
    def from_parts(
        cls, layer: nn.Module, name: str, parts: Mapping[str, Tensor], alpha: float | None = None, scale: Scale = 1.0
    ) -> Self:
        """A LoRA of "down" (rank, in_features) and "up" (out_features, rank)."""
        return cls.from_weights(name, parts["down"], parts["up"], scale, alpha).checked_for(layer)

    def direction(self, weight: Tensor) -> Tensor:
        """The product of the way up and the way down."""
        down, up = self._factors_for(weight)
        return up @ down

    def is_update_of(self, layer: nn.Module) -> bool:
        """Whether `layer` is linear and nothing else, as some that derive from one are not."""
        return type(layer).forward in (Linear.forward, nn.Linear.forward)

    def add_to(self, base: Tensor, x: Tensor, down: Tensor, up: Tensor, factor: Tensor) -> Tensor:
        """The sum of `base` and the update: two matrix products, the second of which also adds."""
        h = F.linear(x, down)
        h = h * (factor if factor.ndim == 1 else self._spread(factor, h))
        if base.ndim == 2:
            return torch.addmm(base, h, up.t())
        return torch.addmm(base.reshape(-1, base.shape[-1]), h.reshape(-1, h.shape[-1]), up.t()).view(base.shape)


class Conv2dLora(Lora[Conv2d]):
    """A low-rank update of a convolution: (B, in_channels, H, W) to (B, out_channels, H', W').

    kernel_size, stride, padding: each a pair, of the down and of the up convolution.
    dilation, padding_mode: of the down convolution.
    groups: of both; it must divide the rank.
    """

    _trailing = (1, 1)
    mid: Conv2d | None  # the core of a Tucker decomposition, up(mid(down(x))): it has the layer's kernel, `down` is 1x1

    def __init__(
        self,
        name: str,
        /,
        in_channels: int,
        out_channels: int,
        rank: int = 16,
        scale: Scale = 1.0,
        kernel_size: tuple[IntPair, IntPair] = (1, 3),
        stride: tuple[IntPair, IntPair] = (1, 1),
        padding: tuple[IntPair | str, IntPair | str] = (0, 1),
        alpha: float | None = None,
        dilation: IntPair = 1,
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_rank(rank, groups)
        shared: dict[str, Any] = {"groups": groups, "use_bias": False, "device": device, "dtype": dtype}
        geometry = {"dilation": dilation, "padding_mode": padding_mode}
        down = Conv2d(in_channels, rank, kernel_size[0], stride[0], padding[0], **geometry, **shared)
        up = Conv2d(rank, out_channels, kernel_size[1], stride[1], padding[1], **shared)
        super().__init__(name, down, up, scale, alpha)
        self.register_module("mid", None)

    @classmethod
    def from_weights(
        cls,
        name: str,
        /,
        down: Tensor,
        up: Tensor,
        scale: Scale = 1.0,
        alpha: float | None = None,
        stride: tuple[IntPair, IntPair] = (1, 1),
        padding: tuple[IntPair | str, IntPair | str] | None = None,
    ) -> Self:
        """A LoRA of given weights, down (rank, in, h, w) and up (out, rank, h, w), which it takes as they are.

        padding: half of each kernel if not given, which keeps height and width at stride 1.
        """
        if down.ndim != 4 or up.ndim != 4 or down.shape[0] != up.shape[1]:
            raise ValueError(f"LoRA {name!r}: down {tuple(down.shape)} and up {tuple(up.shape)} do not share a rank")
        sizes = [(int(weight.shape[2]), int(weight.shape[3])) for weight in (down, up)]
        halves = [(height // 2, width // 2) for height, width in sizes]
        lora = cls(
            name,
            in_channels=down.shape[1],
            out_channels=up.shape[0],
            rank=down.shape[0],
            scale=scale,
            kernel_size=(sizes[0], sizes[1]),
            stride=stride,
            padding=padding or (halves[0], halves[1]),
            alpha=alpha,
            device="meta",
            dtype=down.dtype,
        )
        return _with_weights(lora, down, up)

    @property
    def rank(self) -> int:
        """How many dimensions the map goes through."""
        return self.down.out_channels

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.down.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.up.out_channels

    def misfit(self, layer: nn.Module) -> str | None:
        """Why this map cannot be added to `layer`, or None if it can."""
        if not isinstance(layer, nn.Conv2d):
            return f"it updates a convolution, not a {type(layer).__name__}"
        ours, theirs = (self.in_channels, self.out_channels), (layer.in_channels, layer.out_channels)
        if ours != theirs:
            return f"it maps {ours[0]} to {ours[1]} channels, the layer {theirs[0]} to {theirs[1]}"
        stride = tuple(down * up for down, up in zip(self._spatial.stride, self.up.stride, strict=True))
        return None if stride == layer.stride else f"its stride is {stride}, that of the layer {layer.stride}"

    @classmethod
    def can_stack(cls, loras: Sequence[Lora[Any]]) -> bool:
        """Whether these maps can run as one."""
        geometries = {cast(Conv2dLora, lora)._geometry for lora in loras}
        return len(geometries) == 1 and all(cast(Conv2dLora, lora)._is_plain for lora in loras)

    @property
    def _spatial(self) -> Conv2d:
        """The convolution that has the layer's kernel."""
        return self.down if self.mid is None else self.mid

    @property
    def _geometry(self) -> tuple[Any, ...]:
        return _geometry(self._spatial)

    @property
    def _is_plain(self) -> bool:
        up = self.up
        return self._spatial.groups == 1 and (up.kernel_size, up.stride, up.padding) == ((1, 1), (1, 1), (0, 0))

    @classmethod
    def from_parts(
        cls, layer: nn.Module, name: str, parts: Mapping[str, Tensor], alpha: float | None = None, scale: Scale = 1.0
    ) -> Self:
        """A LoRA with the geometry of `layer` on the way down, and 1x1 on the way up.

        parts: "down" (rank, in, h, w) and "up" (out, rank, 1, 1); or "down" (rank, in, 1, 1) and the core of a Tucker
            decomposition, "mid" (rank, rank, h, w), which only a convolution of one group can have.
        """
        misfit = None if isinstance(layer, nn.Conv2d) else f"it updates a convolution, not a {type(layer).__name__}"
        if misfit or not isinstance(layer, nn.Conv2d):
            raise ValueError(f"LoRA {name!r} does not fit: {misfit}")
        down, up = parts["down"], parts["up"]
        lora: Any = lora_for(layer, name, down.shape[0], scale, alpha, device="meta", dtype=down.dtype)
        if "mid" in parts:
            lora.add_core(parts["mid"])
        lora._check_shapes(down=down, up=up)
        return _with_weights(lora, down, up).checked_for(layer)

    def add_core(self, weight: Tensor) -> None:
        """Put a convolution of this weight (rank, rank, h, w) in the middle, with the kernel that `down` had.

        Raises ValueError if the weight has another shape, or the convolution is of several groups.
        """
        mid, down = self.down, Conv2d(self.in_channels, self.rank, 1, use_bias=False, device="meta", dtype=weight.dtype)
        needed = (self.rank, self.rank, *mid.kernel_size)
        if mid.groups != 1:
            raise ValueError(f"LoRA {self.name!r} has a mid weight, and the layer has {mid.groups} groups")
        if weight.shape != needed:
            raise ValueError(f"LoRA {self.name!r}: the mid weight has shape {tuple(weight.shape)}, not {needed}")
        self.mid, self.down = mid, down
        mid.in_channels = self.rank
        mid.weight = nn.Parameter(weight.detach())

    def parts(self) -> dict[str, Tensor]:
        """As in `Lora`, and "mid" (rank, rank, h, w) if there is one."""
        return super().parts() | ({} if self.mid is None else {"mid": self.mid.weight})

    def factors(self) -> tuple[Tensor, Tensor]:
        """As in `Lora`; what is in the middle is multiplied into the way down."""
        down, up = super().factors()
        if self.mid is not None:
            down = torch.einsum("rshw,si->rihw", _weight(self, "mid"), down.flatten(1))
        return down, up

    def forward(self, x: Tensor) -> Tensor:
        """As in `Lora`."""
        if self.mid is None:
            return super().forward(x)
        h = self.mid(self.down(x.to(self.dtype) if needs_cast(x, self.dtype) else x))
        return self.up(h * self._spread(self.factor.to(h.dtype), h)).to(x.dtype)

    def direction(self, weight: Tensor) -> Tensor:
        """The product of the way up and the way down, in the shape of the layer's weight.

        Raises ValueError if both ways have kernels: the two convolutions are then not one of the layer's kernel.
        """
        down, up = self._factors_for(weight)
        if down.shape[2:].numel() != 1 and up.shape[2:].numel() != 1:
            raise ValueError(f"LoRA {self.name!r} has kernels on both ways, so it is no update of one weight")
        groups = self.down.groups
        ups = up.reshape(groups, -1, *up.shape[1:]).flatten(3)
        downs = down.reshape(groups, -1, *down.shape[1:]).flatten(3)
        return torch.einsum("gorp,griq->goipq", ups, downs).reshape(weight.shape)

    def is_update_of(self, layer: nn.Module) -> bool:
        """Whether `layer` is a convolution and nothing else, of one group and the geometry of this map."""
        if type(layer).forward not in (Conv2d.forward, nn.Conv2d.forward):
            return False
        return cast(nn.Conv2d, layer).groups == 1 and _geometry(cast(nn.Conv2d, layer)) == self._geometry

    def add_to(self, base: Tensor, x: Tensor, down: Tensor, up: Tensor, factor: Tensor) -> Tensor:
        """The sum of `base` and the update: one convolution down, one up."""
        h = self._spatial._conv_forward(x, down, None)
        return base + F.conv2d(h * self._spread(factor, h), up)


def _geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    return (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)


def lora_for(
    layer: nn.Linear | nn.Conv2d,
    name: str,
    rank: int,
    scale: Scale,
    alpha: float | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Lora[Any]:
    """A new update for a layer: for a convolution, the layer's own geometry on the way down and 1x1 on the way up."""
    where: dict[str, Any] = {"device": device or layer.weight.device, "dtype": dtype or layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return LinearLora(name, layer.in_features, layer.out_features, rank, scale, alpha, **where)
    return Conv2dLora(
        name,
        in_channels=layer.in_channels,
        out_channels=layer.out_channels,
        rank=rank,
        scale=scale,
        kernel_size=(cast("tuple[int, int]", layer.kernel_size), 1),
        stride=(cast("tuple[int, int]", layer.stride), 1),
        padding=(cast("tuple[int, int]", layer.padding), 0),
        alpha=alpha,
        dilation=cast("tuple[int, int]", layer.dilation),
        groups=layer.groups,
        padding_mode=layer.padding_mode,
        **where,
    )


def needs_cast(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether `x` has to be brought to `dtype` by hand, as autocast does not do it."""
    return x.dtype is not dtype and not is_autocast_on(x)


def is_autocast_on(x: Tensor) -> bool:
    """Whether products with `x` run in the precision of autocast."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _check_rank(rank: int, groups: int = 1) -> None:
    if rank < 1 or rank % groups:
        raise ValueError(f"the rank of a LoRA must be at least 1 and a multiple of its {groups} groups, not {rank}")


def _with_weights(lora: Any, down: Tensor, up: Tensor) -> Any:
    lora.down.weight = nn.Parameter(down.detach())
    lora.up.weight = nn.Parameter(up.detach())
    lora._make_numbers()
    return lora


def _weight(lora: Lora[Any], part: str) -> Tensor:
    """`lora.down.weight` without torch's slow way to it, unless it is computed (parametrized)."""
    layer = cast(nn.Module, lora._modules[part])
    weight = layer._parameters.get("weight")
    return cast(Tensor, layer.weight) if weight is None else weight
