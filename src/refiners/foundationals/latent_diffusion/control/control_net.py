"""ControlNet (arXiv 2302.05543): a trainable copy of a UNet's way down that also sees a picture, such as of edges.

(B, in_channels, h, w) latents to what is to be added to each output that the UNet's way down leaves, and to its
middle's: a tuple in that order. It reads the contexts that the UNet reads, and "control_net" / "condition":
(B or 1, 3, f h, f w), 0 … 1, where f is the spec's downsampling factor.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.fluxion.context import Contexts, placed
from refiners.fluxion.layers.module import single_output
from refiners.foundationals.latent_diffusion.time_encoder import TimestepEncoder
from refiners.foundationals.latent_diffusion.unet import DownBlocks, MiddleBlock, UNet
from refiners.foundationals.latent_diffusion.unet_spec import SD1_UNET, UNetSpec

FEATURES = ("control_net", "features")  # where the condition's features are: (B or 1, channels, h, w)


@dataclass(frozen=True)
class ControlNetSpec:
    """The sizes of a ControlNet.

    unet: those of the UNet that it is a copy of; its way up does not count.
    condition_channels: widths in the encoder of the condition, each at half the side of the one before.
    averages: whether what it adds is the same at all positions, as to lead by colours and style alone.
    """

    unet: UNetSpec = SD1_UNET
    condition_channels: tuple[int, ...] = (16, 32, 96, 256)
    averages: bool = False

    @property
    def downsampling_factor(self) -> int:
        """How many pixels of the condition, along a side, are one latent."""
        return 2 ** (len(self.condition_channels) - 1)

    @property
    def num_outputs(self) -> int:
        """How many tensors it gives: for each output that the way down leaves, and for the middle's."""
        return len(self.unet.skip_channels) + 1


@single_output
class ZeroConvolution(fl.Conv2d):
    """A convolution that starts at zero, so that at first a ControlNet changes nothing (section 3.1)."""

    def reset_parameters(self) -> None:
        """Set the weight and the bias to 0."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class ConditionEncoder(fl.Chain):
    """A picture to features of the latents' size: (B, 3, f h, f w) to (B, channels, h, w)."""

    def __init__(self, spec: ControlNetSpec) -> None:
        first, last = spec.condition_channels[0], spec.condition_channels[-1]
        super().__init__(
            fl.Conv2d(3, first, kernel_size=3, padding=1),
            fl.SiLU(),
            *(
                layer
                for width, next_width in pairwise(spec.condition_channels)
                for layer in (
                    fl.Conv2d(width, width, kernel_size=3, padding=1),
                    fl.SiLU(),
                    fl.Conv2d(width, next_width, kernel_size=3, padding=1, stride=2),
                    fl.SiLU(),
                )
            ),
            ZeroConvolution(last, spec.unet.channels[0], kernel_size=3, padding=1),
        )


class ControlOutputs(fl.Parallel):
    """What the way down left, step by step, and the middle's output, each through a convolution of its own."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__(
            *(
                fl.Chain(
                    fl.UseContext("unet", "residuals").compose(_take_first),
                    ZeroConvolution(width, width, kernel_size=1),
                )
                for width in spec.skip_channels
            ),
            ZeroConvolution(spec.channels[-1], spec.channels[-1], kernel_size=1),
        )


class ControlNet(fl.Chain):
    """What to add to a UNet's features, from noisy latents, a time step, a text and a picture."""

    def __init__(
        self,
        spec: ControlNetSpec | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.spec = spec = spec or ControlNetSpec()
        with placed(device, dtype):
            super().__init__(
                fl.Passthrough(
                    fl.UseContext("diffusion", "timestep"),
                    TimestepEncoder(spec.unet),
                    fl.SetContext("unet", "time_embedding"),
                ),
                fl.SetContextDefault(
                    *FEATURES,
                    fl.UseContext("control_net", "condition"),
                    ConditionEncoder(spec),
                ),
                DownBlocks(spec.unet),
                MiddleBlock(spec.unet),
                ControlOutputs(spec.unet),
                *([fl.Distribute(*(fl.Lambda(_average) for _ in range(spec.num_outputs)))] if spec.averages else []),
            )
        first_step: fl.Chain = self.DownBlocks[0]
        first_step.insert(len(first_step) - 1, fl.Residual(fl.UseContext(*FEATURES)))

    def init_context(self) -> Contexts:
        return {"unet": {"residuals": []}, "flatten": {"sizes": []}}

    @property
    def condition_encoder(self) -> ConditionEncoder:
        """What makes features of the condition."""
        return cast(ConditionEncoder, self.SetContextDefault.ConditionEncoder)

    @classmethod
    def from_unet(cls, unet: UNet, condition_channels: tuple[int, ...] = (16, 32, 96, 256)) -> Self:
        """A new one, to be trained: it has copies of the UNet's weights and changes nothing yet (section 3.2).

        Adapters of the UNet are not copied.
        """
        control_net = cls(ControlNetSpec(unet.spec, condition_channels), device=unet.device, dtype=unet.dtype)
        own, theirs = control_net.state_dict(), cast("dict[str, Tensor]", unet.state_dict())
        control_net.load_state_dict({**own, **{name: theirs[name] for name in own if name in theirs}})
        return control_net


def _average(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3), keepdim=True)


def _take_first(residuals: list[Any]) -> Any:
    return residuals.pop(0)
