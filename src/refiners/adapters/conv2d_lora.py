"""LoRA of convolutions, with the core of a Tucker decomposition in the middle or not (LoCon, arXiv 2309.14859)."""

from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refiners.adapters.delta import Scale
from refiners.adapters.low_rank import Lora, check_rank, needs_cast, weight_of, with_weights
from refiners.fluxion.layers.conv import Conv2d, IntPair, PaddingMode


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
        check_rank(rank, groups)
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
        return with_weights(lora, down, up)

    @classmethod
    def for_layer(
        cls,
        layer: nn.Conv2d,
        name: str,
        rank: int = 16,
        scale: Scale = 1.0,
        alpha: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A new update, which is zero at first: the layer's geometry on the way down, 1x1 on the way up.

        device, dtype: those of the layer if not given.
        """
        of_layer: Any = layer  # torch types its pairs as tuples of any length
        return cls(
            name,
            in_channels=layer.in_channels,
            out_channels=layer.out_channels,
            rank=rank,
            scale=scale,
            kernel_size=(of_layer.kernel_size, 1),
            stride=(of_layer.stride, 1),
            padding=(of_layer.padding, 0),
            alpha=alpha,
            dilation=of_layer.dilation,
            groups=layer.groups,
            padding_mode=of_layer.padding_mode,
            device=device or layer.weight.device,
            dtype=dtype or layer.weight.dtype,
        )

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
        lora: Any = cls.for_layer(layer, name, down.shape[0], scale, alpha, device="meta", dtype=down.dtype)
        if "mid" in parts:
            lora.add_core(parts["mid"])
        lora._check_shapes(down=down, up=up)
        return with_weights(lora, down, up).checked_for(layer)

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
            down = torch.einsum("rshw,si->rihw", weight_of(self, "mid"), down.flatten(1))
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
