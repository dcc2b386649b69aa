"""The UNet of latent diffusion (arXiv 2112.10752, appendix E): predicts the noise in latents from time and text.

(B, in_channels, h, w) latents to (B, out_channels, h, w). What else it needs comes through contexts:
"diffusion" / "timestep": (B,) or (1,), 0 … 999, and what `CONDITIONS` tells of.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.fluxion.checks import instance_of
from refiners.fluxion.context import Contexts, placed
from refiners.fluxion.layers.flattening import keep_size, to_picture, to_sequence
from refiners.foundationals.latent_diffusion.participant import Participant
from refiners.foundationals.latent_diffusion.time_encoder import TimestepEncoder
from refiners.foundationals.latent_diffusion.unet_spec import SD1_UNET, UNetSpec


class PositionEncoder(fl.Residual):
    """Adds where in the picture each position lies, as waves along its height and width: (B, C, h, w) to the same."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__(
            Waves(spec.position_frequencies),
            fl.Conv2d(4 * spec.position_frequencies, spec.channels[0], kernel_size=1),
        )


class Waves(fl.Module):
    """cos and sin of π k y and π k x, for k = 1 … count; y and x go from 0 to 1: (B, C, h, w) to (B, 4 count, h, w)."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        rows = self._along(height, x)[:, :, None].expand(-1, -1, width)
        columns = self._along(width, x)[:, None, :].expand(-1, height, -1)
        return torch.cat([rows, columns]).expand(x.shape[0], -1, -1, -1)

    def _along(self, size: int, like: Tensor) -> Tensor:
        middles = (torch.arange(size, device=like.device, dtype=torch.float32) + 0.5) / size
        numbers = torch.arange(1, self.count + 1, device=like.device, dtype=torch.float32)
        angles = math.pi * numbers[:, None] * middles
        return torch.cat([angles.cos(), angles.sin()]).to(like.dtype)

    def extra_repr(self) -> str:
        return str(self.count)


class ResidualBlock(fl.Sum):
    """Two convolutions with the time embedding added in between, and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, spec: UNetSpec) -> None:
        super().__init__(
            fl.Chain(
                fl.GroupNorm(in_channels, spec.norm_groups),
                fl.SiLU(),
                fl.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
                fl.Residual(
                    fl.UseContext("unet", "time_embedding"),
                    fl.Linear(spec.time_dim, out_channels),
                    fl.Reshape(out_channels, 1, 1),
                ),
                fl.GroupNorm(out_channels, spec.norm_groups),
                fl.SiLU(),
                fl.Conv2d(out_channels, out_channels, kernel_size=3, padding=1),
            ),
            fl.Identity() if in_channels == out_channels else fl.Conv2d(in_channels, out_channels, kernel_size=1),
        )


class FeedForward(fl.Chain):
    """A gated perceptron (GEGLU, arXiv 2002.05202)."""

    def __init__(self, width: int) -> None:
        super().__init__(
            fl.Linear(width, 8 * width),
            fl.GLU(fl.GeLU()),
            fl.Linear(4 * width, width),
        )


class TransformerLayer(fl.Chain):
    """Attention over the picture, attention to the text, perceptron."""

    def __init__(self, width: int, num_heads: int, text_dim: int) -> None:
        super().__init__(
            fl.Residual(
                fl.LayerNorm(width),
                fl.SelfAttention(width, num_heads=num_heads, use_bias=False),
            ),
            fl.Residual(
                fl.LayerNorm(width),
                fl.Parallel(
                    fl.Identity(),
                    fl.UseContext("cross_attention", "text_embedding"),
                    fl.UseContext("cross_attention", "text_embedding"),
                ),
                fl.Attention(
                    width,
                    num_heads=num_heads,
                    key_embedding_dim=text_dim,
                    value_embedding_dim=text_dim,
                    use_bias=False,
                ),
            ),
            fl.Residual(
                fl.LayerNorm(width),
                FeedForward(width),
            ),
        )


class SpatialTransformer(fl.Residual):
    """Transformer layers over the positions of a picture: (B, C, h, w) to the same."""

    def __init__(self, width: int, num_layers: int, num_heads: int, spec: UNetSpec) -> None:
        super().__init__(
            fl.GroupNorm(width, spec.norm_groups, eps=1e-6),
            keep_size(),
            *_sequence_projection(width, spec),
            *(TransformerLayer(width, num_heads, spec.text_dim) for _ in range(num_layers)),
            *reversed(_picture_projection(width, spec)),
        )


def _sequence_projection(width: int, spec: UNetSpec) -> list[fl.Module]:
    if spec.has_linear_projection:
        return [to_sequence(), fl.Linear(width, width)]
    return [fl.Conv2d(width, width, kernel_size=1), to_sequence()]


def _picture_projection(width: int, spec: UNetSpec) -> list[fl.Module]:
    if spec.has_linear_projection:
        return [to_picture(), fl.Linear(width, width)]
    return [fl.Conv2d(width, width, kernel_size=1), to_picture()]


def _block(in_channels: int, level: int, spec: UNetSpec) -> Iterator[fl.Module]:
    width, num_layers = spec.channels[level], spec.transformer_layers[level]
    yield ResidualBlock(in_channels, width, spec)
    if num_layers:
        yield SpatialTransformer(width, num_layers, spec.num_heads[level], spec)


class DownBlocks(fl.Chain):
    """The way down: each step leaves its output for the way up."""

    def __init__(self, spec: UNetSpec) -> None:
        steps: list[list[fl.Module]] = [[fl.Conv2d(spec.in_channels, spec.channels[0], kernel_size=3, padding=1)]]
        if spec.position_frequencies:
            steps[0].append(PositionEncoder(spec))
        width = spec.channels[0]
        for level, next_width in enumerate(spec.channels):
            for _ in range(spec.blocks_per_level):
                steps.append([*_block(width, level, spec)])
                width = next_width
            if level < len(spec.channels) - 1:
                steps.append([fl.Downsample(width, scale_factor=2, padding=1)])
        super().__init__(fl.Chain(*step, fl.SetContext("unet", "residuals", callback=_push)) for step in steps)


class MiddleBlock(fl.Chain):
    """The lowest resolution: two residual blocks around a transformer, or one without any."""

    def __init__(self, spec: UNetSpec) -> None:
        width, num_layers = spec.channels[-1], spec.num_middle_layers
        transformer = [SpatialTransformer(width, num_layers, spec.num_heads[-1], spec)] if num_layers else []
        super().__init__(
            ResidualBlock(width, width, spec),
            *(layer for each in transformer for layer in (each, ResidualBlock(width, width, spec))),
        )


class UpBlocks(fl.Chain):
    """The way up: each step takes in what the matching step of the way down left."""

    def __init__(self, spec: UNetSpec) -> None:
        skips, width = spec.skip_channels, spec.channels[-1]
        steps: list[list[fl.Module]] = []
        for level in reversed(range(len(spec.channels))):
            for _ in range(spec.blocks_per_level + 1):
                steps.append([*_block(width + skips.pop(), level, spec)])
                width = spec.channels[level]
            if level > 0:
                steps[-1].append(fl.Upsample(width))
        super().__init__(
            fl.Chain(
                fl.Concatenate(fl.Identity(), fl.UseContext("unet", "residuals").compose(_pop), dim=1),
                *step,
            )
            for step in steps
        )


class OutputBlock(fl.Chain):
    """From the features of the last step to the prediction."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__(
            fl.GroupNorm(spec.channels[0], spec.norm_groups),
            fl.SiLU(),
            fl.Conv2d(spec.channels[0], spec.out_channels, kernel_size=3, padding=1),
        )


# Where in the contexts of a UNet its conditions are; `UNetSpec.conditions` tells which it has.
# clip_text_embedding: (B, L, text_dim).  pooled_text_embedding: (B, pooled_text_dim), of the text as a whole.
# time_ids: (B, num_time_ids).  condition_scale: (B,), of guidance.
CONDITIONS = {
    "clip_text_embedding": ("cross_attention", "text_embedding"),
    "pooled_text_embedding": ("diffusion", "pooled_text_embedding"),
    "time_ids": ("diffusion", "time_ids"),
    "condition_scale": ("diffusion", "condition_scale"),
}


class UNet(fl.Chain):
    """Noise, velocity or clean latents (what it was trained for) from noisy latents, a time step and a text."""

    _looks_below = True
    _participants: tuple[Participant, ...] | None

    def __init__(
        self,
        spec: UNetSpec = SD1_UNET,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.spec = spec
        with placed(device, dtype):
            super().__init__(
                fl.Passthrough(
                    fl.UseContext("diffusion", "timestep"),
                    TimestepEncoder(spec),
                    fl.SetContext("unet", "time_embedding"),
                ),
                DownBlocks(spec),
                MiddleBlock(spec),
                UpBlocks(spec),
                OutputBlock(spec),
            )

    def init_context(self) -> Contexts:
        return {"unet": {"residuals": []}, "flatten": {"sizes": []}}

    def set_timestep(self, timestep: Tensor) -> None:
        """Set the time step of the next call, (B,) or (1,), 0 … 999."""
        self.set_context("diffusion", {"timestep": timestep})

    def set_clip_text_embedding(self, clip_text_embedding: Tensor) -> None:
        """Set the text of the next call, (B, L, text_dim)."""
        self.set_context("cross_attention", {"text_embedding": clip_text_embedding})

    def set_pooled_text_embedding(self, pooled_text_embedding: Tensor) -> None:
        """Set the text of the next call as a whole, (B, pooled_text_dim), for a UNet that reads it."""
        self.set_context("diffusion", {"pooled_text_embedding": pooled_text_embedding})

    def set_time_ids(self, time_ids: Tensor) -> None:
        """Set the sizes and the like of the next call, (B, num_time_ids), for a UNet that reads them."""
        self.set_context("diffusion", {"time_ids": time_ids})

    def set_condition_scale(self, condition_scale: Tensor) -> None:
        """Set the scale of guidance of the next call, (B,), for a UNet that reads it."""
        self.set_context("diffusion", {"condition_scale": condition_scale})

    def set_conditions(self, conditions: Mapping[str, Tensor]) -> None:
        """Set all that the next call is to know besides the time step, by name.

        Raises ValueError if there is something that this UNet does not read, or something is missing.
        """
        wanted, of_adapters = self.spec.conditions, self.adapter_conditions
        if conditions.keys() - of_adapters.keys() != set(wanted):
            raise ValueError(
                f"this UNet is to be given {', '.join(wanted)}, but was given {', '.join(conditions) or 'nothing'}"
            )
        for name, condition in conditions.items():
            context, key = CONDITIONS[name] if name in CONDITIONS else name.split(".")
            self.set_context(context, {key: condition})

    @property
    def adapter_conditions(self) -> dict[str, Tensor]:
        """What adapters in this tree bring, in the same halves as all other conditions, by "context.key"."""
        return {name: value for participant in self.participants for name, value in participant.conditions.items()}

    @property
    def participants(self) -> tuple[Participant, ...]:
        """The modules in this tree that take part in its calls, in the order of the tree."""
        if self._participants is None:
            self.__dict__["_participants"] = tuple(each for each in self.modules() if isinstance(each, Participant))
        return cast("tuple[Participant, ...]", self._participants)

    def _refresh(self) -> None:
        super()._refresh()
        self.__dict__["_participants"] = None  # to be looked for, as the tree was edited

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_participants": None}


class HasUNet(Protocol):
    """A model with a UNet."""

    @property
    def unet(self) -> UNet: ...


def unet_of(target: UNet | HasUNet) -> UNet:
    """The UNet itself, or that of a model. Raises TypeError if it is neither."""
    found: Any = getattr(target, "unet", target)
    return instance_of(found, UNet, "the target", "a UNet, or a model that has one")


def _pop(values: list[Any]) -> Any:
    return values.pop()


def _push(residuals: list[Any], x: Tensor) -> None:
    residuals.append(x)
