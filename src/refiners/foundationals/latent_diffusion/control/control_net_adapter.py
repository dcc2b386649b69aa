"""ControlNets on a UNet: each sees the latents and a picture, and what it makes is added to the UNet's features.

    edges = ControlNetAdapter(model, "control_canny.safetensors").inject()
    edges.set_controlnet_condition(picture)
    edges.scale = 0.8

The ControlNet is no part of the UNet's tree, so that what searches or adapts the UNet finds the UNet's layers only; it
moves with the tree all the same.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self, cast

import torch
from PIL import Image
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.adapters.delta import Scale, repeated, shown
from refiners.adapters.scaling import Scaling
from refiners.fluxion.checks import list_of_pictures
from refiners.fluxion.utils import images_to_tensor
from refiners.foundationals.latent_diffusion.control.control_net import ControlNet
from refiners.foundationals.latent_diffusion.control.control_net_weights import load_control_net
from refiners.foundationals.latent_diffusion.model import resized
from refiners.foundationals.latent_diffusion.participant import Participant
from refiners.foundationals.latent_diffusion.unet import HasUNet, UNet, unet_of
from refiners.foundationals.latent_diffusion.unet_call import check_one_for_each

READ_CONTEXTS = ("diffusion", "cross_attention")  # those of the UNet that a ControlNet sees as well


class AddControl(fl.ContextModule):
    """Adds what one ControlNet has left, if it ran, to what the UNet's way down left and to the middle's output."""

    def forward(self, x: Tensor) -> Tensor:
        contexts = self.ensure_parent.contexts
        left = contexts.get("control", {}).get("residuals")
        if not left:
            return x
        *additions, addition = left.pop()
        residuals = contexts["unet"]["residuals"]
        residuals[:] = [residual + added for residual, added in zip(residuals, additions, strict=True)]
        return x + addition


class ControlNetAdapter(fl.ContextModule, Participant):
    """Leads a UNet by a picture. Several add up, in any order.

    target: a UNet, or a model with one.
    control_net: what is run, or where to load it from: see `load_control_net`.
    scale: how strong it is: a number, or one for each picture of a batch.
    scale_decay: what is added counts the less the earlier it comes on the way down: of n, number i counts
        decay^(n - 1 - i). 0.825 leaves more to the prompt.
    start, end: the share of the steps between which it is on; off, it does not run.
    Raises ValueError if the ControlNet is for other UNets.
    """

    condition: Tensor | None  # (P, 3, H, W)
    features: Tensor | None  # (P, C, h, w): of the condition
    scaling: Scaling

    def __init__(
        self,
        target: UNet | HasUNet,
        control_net: ControlNet | Path | str,
        scale: Scale = 1.0,
        scale_decay: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
    ) -> None:
        super().__init__()
        unet = unet_of(target)
        if not isinstance(control_net, ControlNet):
            control_net = load_control_net(control_net, unet)
        _check_fits(control_net, unet)
        if not 0 <= start < end <= 1:
            raise ValueError(f"start {start} and end {end} should be shares of the steps, from 0 to 1, start first")
        if not 0 < scale_decay <= 1:
            raise ValueError(f"scale_decay is {scale_decay}, but should be above 0 and at most 1 (no decay)")
        self.start = start
        self.end = end
        self.scale_decay = scale_decay
        self._unet = (unet,)  # in tuples: no children
        self._control_net = (control_net,)
        self._is_active = True
        self.scaling = Scaling(scale)
        self.register_buffer("condition", None, persistent=False)
        self.register_buffer("features", None, persistent=False)
        self.scaling.to(unet.device)

    @property
    def control_net(self) -> ControlNet:
        """What is run: a tree of its own, to be trained, moved or adapted."""
        return self._control_net[0]

    # -- the tree

    def inject(self) -> Self:
        """Let it lead the UNet. Raises RuntimeError if it does already."""
        if self.parent is not None:
            raise RuntimeError("this ControlNetAdapter is injected already: eject it first")
        (unet,) = self._unet
        with fl.transaction():
            unet.insert(0, self)
            unet.insert(list(unet).index(unet["MiddleBlock"]) + 1, AddControl())
        return self

    def eject(self) -> None:
        """Take it off the UNet, which is as it was before. Raises RuntimeError if it is not injected."""
        if self.parent is None:
            raise RuntimeError("this ControlNetAdapter is not injected, so it cannot be ejected")
        unet = cast(UNet, self.parent)
        with fl.transaction():
            unet.remove(self)
            unet.remove(next(child for child in unet if isinstance(child, AddControl)))  # they are all alike
        self._unet = (unet,)

    def structural_copy(self) -> Self:
        """A copy with a scale and a condition of its own and the same weights."""
        clone = super().structural_copy()
        clone._control_net = (self.control_net.structural_copy(),)
        clone._modules["scaling"] = self.scaling.structural_copy()
        return clone

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.control_net._apply(fn, recurse)
        return self

    # -- the condition

    def set_controlnet_condition(
        self, condition: Tensor | Image.Image | Sequence[Image.Image], size: tuple[int, int] | None = None
    ) -> None:
        """Lead all calls from now on by this picture, or by as many as pictures are made.

        condition: (1 or B, 3, H, W) in [0, 1] on any device; or of any mode, which is turned into RGB without its
            transparency. H and W are those of the picture that is made.
        size: height and width to resize pictures to; None leaves them as they are.
        Its features are worked out at the first step and kept: set it anew after a change of the ControlNet's weights.
        Raises ValueError for other shapes or values, TypeError for what is no picture.
        """
        if not isinstance(condition, Tensor):
            images = list_of_pictures(condition, "the condition")
            condition = images_to_tensor([resized(image, size or (image.height, image.width)) for image in images])
        if condition.ndim != 4 or condition.shape[1] != 3 or not condition.numel():
            raise ValueError(f"a condition should be (B, 3, H, W), but this one is {tuple(condition.shape)}")
        if not (condition.min() >= 0 and condition.max() <= 1):
            raise ValueError(
                f"a condition should have values from 0 to 1, but these go from {condition.min():.3g} to "
                f"{condition.max():.3g}: is it scaled to -1 … 1, or to 255?"
            )
        self._buffers["condition"] = condition.to(self.control_net.device, self.control_net.dtype)
        self._buffers["features"] = None

    def before_step(self, index: int, count: int) -> None:
        """Switch on from `start` to `end`, and have the features of the condition ready if nothing is trained."""
        self._is_active = index / count >= self.start and (index + 1) / count <= self.end
        if self._is_active and self.features is None and self.condition is not None and not torch.is_grad_enabled():
            self._buffers["features"] = self.control_net.condition_encoder(self.condition)

    @property
    def scale(self) -> float | tuple[float, ...]:
        """How strong it is; 0 is off, 1 as its maker meant it. What was compiled stays good."""
        return self.scaling.scale

    @scale.setter
    def scale(self, value: Scale) -> None:
        self.scaling.scale = value

    # -- running

    def forward(self, x: Tensor) -> Tensor:
        if not self._is_active:
            return x
        for name in READ_CONTEXTS:
            self.control_net.set_context(name, self.use_context(name))
        self.control_net.set_context("control_net", self._condition_for(x))
        outputs: tuple[Tensor, ...] = self.control_net(x[:, : self.control_net.spec.unet.in_channels])
        if self.scale_decay != 1:
            powers = reversed(range(len(outputs)))
            outputs = tuple([output * self.scale_decay**power for output, power in zip(outputs, powers, strict=True)])
        control = self.ensure_parent.contexts.setdefault("control", {}).setdefault("residuals", [])
        control.append([self.scaling(output) for output in outputs])
        return x

    def _condition_for(self, x: Tensor) -> dict[str, Tensor]:
        """The condition, or its features, for each row of latents."""
        if self.condition is None:
            raise ValueError("this ControlNetAdapter has no condition: call set_controlnet_condition first")
        part = self.ensure_parent.contexts.get("control", {}).get(self._slot)
        factor = self.control_net.spec.downsampling_factor
        wanted = (x.shape[2] * factor, x.shape[3] * factor)
        if part is None and self.condition.shape[2:] != wanted:
            raise ValueError(
                f"the condition is {tuple(self.condition.shape[2:])}, but latents of {tuple(x.shape[2:])} need one of "
                f"{wanted} (height, width): resize it, as with set_controlnet_condition(…, size={wanted})"
            )
        value = cast(Tensor, self._kept if part is None else part)
        check_one_for_each("conditions of a ControlNet", value.shape[0], x.shape[0], self.use_context("diffusion"))
        name = "condition" if self._kept is self.condition else "features"
        return {name: value if value.shape[0] == 1 else repeated(value, x.shape[0])}

    @property
    def spatial_conditions(self) -> dict[str, Tensor]:
        """What covers the picture, by "context.key": parts of it are set there where the UNet sees parts."""
        return {} if self._kept is None or not self._is_active else {f"control.{self._slot}": self._kept}

    @property
    def _kept(self) -> Tensor | None:
        """The features of the condition, or itself if they are not kept."""
        is_ready = self.features is not None and not torch.is_grad_enabled()
        return self.features if is_ready else self.condition

    @property
    def _slot(self) -> str:
        """Another for each ControlNet of a UNet."""
        return self.ensure_parent.slot_of(self)

    def extra_repr(self) -> str:
        steps = "" if (self.start, self.end) == (0, 1) else f", start={self.start:g}, end={self.end:g}"
        return f"scale={shown(self.scale)}{steps}"


def _check_fits(control_net: ControlNet, unet: UNet) -> None:
    for name in ("skip_channels", "text_dim", "pooled_text_dim", "num_time_ids"):
        ours, theirs = getattr(control_net.spec.unet, name), getattr(unet.spec, name)
        if ours != theirs:
            raise ValueError(
                f"the ControlNet has {name} {ours}, but the UNet has {theirs}: it was made for another model"
            )
