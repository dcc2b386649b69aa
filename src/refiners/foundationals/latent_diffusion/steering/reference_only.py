"""Reference-only control: the picture attends to a reference picture at the same level of noise as well.

From discussions 1236 and 1280 of Mikubill/sd-webui-controlnet; no weights of its own are needed. By the second one
features take on the statistics of the reference's as well, or only those: AdaIN (arXiv 1703.06868, eq. 8).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.adapters.adapter import Adapter
from refiners.adapters.scaling import Scaling
from refiners.fluxion.checks import instance_of
from refiners.fluxion.context import Context, Contexts, placed
from refiners.foundationals.latent_diffusion.copies import Twins, copied
from refiners.foundationals.latent_diffusion.model import LatentDiffusionModel
from refiners.foundationals.latent_diffusion.participant import Participant
from refiners.foundationals.latent_diffusion.steering.self_attentions import self_attentions
from refiners.foundationals.latent_diffusion.steering.steering import Steering
from refiners.foundationals.latent_diffusion.unet import (
    DownBlocks,
    HasUNet,
    MiddleBlock,
    ResidualBlock,
    SpatialTransformer,
    UNet,
    UpBlocks,
    unet_of,
)
from refiners.solvers.solver import Generators, unit_noise

CONTEXT = "reference_only"

# Latents (1 or B, 4, h, w) at the level of a step, of its number, 0 … count - 1, and how many there are.
Reference = Callable[[int, int], Tensor]


class ReferenceOnlyControlAdapter(Steering):
    """Runs the UNet on a reference too, in each call, and has the picture take after what was seen there.

    target: a UNet, or a model with one.
    style_cfg: how much of it the predictions for negative prompts get, 0 … 1; less makes guidance lead to it.
    has_attention: whether every self-attention sees the reference's positions.
    has_adain: whether features of the coarser half of the UNet get the mean and the deviation over positions that each
        channel has in the reference.
    Raises ValueError if it has neither, or for another style_cfg.
    """

    def __init__(
        self, target: UNet | HasUNet, style_cfg: float = 0.5, has_attention: bool = True, has_adain: bool = False
    ) -> None:
        if not (has_attention or has_adain):
            raise ValueError("reference-only control with neither attention nor AdaIN does nothing: choose one or both")
        _check_style_cfg(style_cfg)
        unet = unet_of(target)
        with placed(unet.device):
            attentions = [
                (ReferencedAttention(place.product, style_cfg), place.attention) for place in self_attentions(unet)
            ]
            statistics = [(ReferencedStatistics(layer, style_cfg), place) for layer, place in coarse_features(unet)]
        self._referenced = [*(attentions if has_attention else []), *(statistics if has_adain else [])]
        super().__init__(self._referenced)
        self.unet = unet
        self._run = ReferenceRun()

    def set_controlnet_condition(self, condition: Tensor | Reference) -> None:
        """Set the reference of all calls from now on.

        condition: latents (1 or B, 4, h, w) with the noise of the step to come, or a function that gives them for each.
        """
        self._run.set_reference(condition)

    def set_reference(self, model: LatentDiffusionModel, clean: Tensor, generator: Generators = None) -> None:
        """Set the reference of all calls from now on: clean latents, which get the noise of each step of the model."""
        instance_of(model, LatentDiffusionModel, "the model", "the whole one that makes the pictures")
        instance_of(clean, Tensor, "the reference", "latents, as lda.encode_image makes them")
        self._run.set_reference(Noised(model, clean, unit_noise(clean, generator)))

    @property
    def style_cfg(self) -> float:
        """How much of it the predictions for negative prompts get. What was compiled stays good."""
        return self._referenced[0][0].style_cfg

    @style_cfg.setter
    def style_cfg(self, value: float) -> None:
        _check_style_cfg(value)
        for adapter, _ in self._referenced:
            adapter.layer("Scaling", Scaling).scale = value

    def inject(self) -> Self:
        """Put the edit on the UNet. Raises RuntimeError if it, or another of its kind, is there already."""
        if self.unet.find(ReferenceRun) is not None:
            raise RuntimeError("there is a reference-only control on this UNet already: eject it first")
        with fl.transaction():
            super().inject()
            self.unet.insert(list(self.unet._modules).index("DownBlocks"), self._run)
        return self

    def eject(self) -> None:
        """Take the edit off: the UNet is as it was without it, bit by bit. Raises RuntimeError if it is not there."""
        with fl.transaction():
            super().eject()
            self.unet.remove(self._run)


class ReferenceRun(fl.Chain, Participant):
    """Runs what comes after it on the reference, with the conditions of this call, and returns its own input."""

    def __init__(self) -> None:
        super().__init__()
        self._reference: Tensor | None = None
        self._reference_at: Reference | None = None

    def set_reference(self, reference: Tensor | Reference) -> None:
        """Take the reference of the calls to come, or the rule for it. Raises TypeError if it is neither."""
        if not callable(reference):
            instance_of(reference, Tensor, "the reference", "latents, as lda.encode_image makes them, or a function")
        self._reference, self._reference_at = (reference, None) if isinstance(reference, Tensor) else (None, reference)

    def settle(self, twins: Twins) -> None:
        """Take the levels of noise from the model that this is in now, a copy of the one that it was in."""
        self._reference_at = copied(self._reference_at, twins)

    def before_step(self, index: int, count: int) -> None:
        """Get the reference of a step."""
        if self._reference_at is not None:
            self._reference = self._reference_at(index, count)

    def init_context(self) -> Contexts:
        return {CONTEXT: {"is_reference": False, "seen": [], "statistics": []}}

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,), contexts, layers = inputs, self.contexts, self.ensure_parent._plan
        context = contexts[CONTEXT]
        kept = {name: _with_own_lists(values) for name, values in contexts.items() if name != CONTEXT}
        h = self._reference_for(x)
        context["is_reference"] = True
        for layer in layers[layers.index(self) + 1 :]:
            h = layer(h)
        context["is_reference"] = False
        contexts.update(kept)
        return x

    def _reference_for(self, x: Tensor) -> Tensor:
        """The reference in the batch and with the further channels (those of inpainting) of x."""
        if self._reference is None:
            raise ValueError("reference-only control has no reference: call set_controlnet_condition or set_reference")
        reference = self._reference.to(x)
        channels = cast(UNet, self.ensure_parent).spec.out_channels
        further = x[:, channels:]
        is_whole = further.shape[1] == 0
        fits = reference.ndim == 4 and x.shape[0] % len(reference) == 0 and reference.shape[1] == channels
        if not fits or not (is_whole or reference.shape[2:] == x.shape[2:]):
            raise ValueError(
                f"the reference is {tuple(reference.shape)}, but the latents are {tuple(x.shape)}: give one of "
                f"{channels} channels for all pictures or one for each, and to an inpainting model one of the same size"
            )
        repeated = reference.repeat(x.shape[0] // len(reference), 1, 1, 1)
        return repeated if is_whole else torch.cat([repeated, further], dim=1)


class Referenced(fl.Chain, Adapter[nn.Module]):
    """A layer that is led by what it saw of the reference, for negative prompts in a part."""

    def __init__(self, target: nn.Module, style_cfg: float) -> None:
        with self.setup_adapter(target):
            super().__init__(target, fl.Return(), Scaling(style_cfg))

    @property
    def style_cfg(self) -> float:
        """The part that negative prompts get."""
        return cast(float, self.layer("Scaling", Scaling).scale)

    @property
    def negatives(self) -> int:
        """How many of the batch, from its front, are for negative prompts."""
        return self.use_context("diffusion").get("negatives", 0)

    def mixed(self, led: Tensor, alone: Tensor) -> Tensor:
        """All that is led, but of the negative prompts' a part only; alone: theirs without the reference."""
        count = len(alone)
        return torch.cat([alone + self.Scaling(led[:count] - alone), led[count:]])


class ReferencedAttention(Referenced):
    """Keeps keys and values of the reference, and then lets the picture's queries see them too."""

    def forward(self, *inputs: Tensor) -> Tensor:
        (query, key, value), context, count = inputs, self.use_context(CONTEXT), self.negatives
        if context["is_reference"]:
            context["seen"].append((key, value))
            return super().forward(query, key, value)
        seen_key, seen_value = context["seen"].pop(0)
        h = super().forward(query, torch.cat([seen_key, key], dim=1), torch.cat([seen_value, value], dim=1))
        return self.mixed(h, super().forward(query[:count], key[:count], value[:count])) if count else h


class ReferencedStatistics(Referenced):
    """Keeps mean and deviation of the reference's features over positions, and then gives them to the picture's."""

    def forward(self, *inputs: Tensor) -> Tensor:
        x, context, count = super().forward(*inputs), self.use_context(CONTEXT), self.negatives
        mean, deviation = _statistics(x)
        if context["is_reference"]:
            context["statistics"].append((mean, deviation))
            return x
        seen_mean, seen_deviation = context["statistics"].pop(0)
        h = (x - mean) / deviation * seen_deviation + seen_mean
        return self.mixed(h, x[:count]) if count else h


def coarse_features(unet: UNet) -> Iterator[tuple[nn.Module, fl.Chain]]:
    """What gives the features of the lower half of the levels, in the order of the run, each with the chain it is in.

    These are the last layer of each step but the halvings and doublings, and of the middle. As by default in
    sd-webui-controlnet, of an odd number of levels the one in the middle counts on the way up only.
    """
    count, blocks = len(unet.spec.channels), unet.spec.blocks_per_level
    down, middle, up = unet.ensure_find(DownBlocks), unet.ensure_find(MiddleBlock), unet.ensure_find(UpBlocks)
    steps: list[fl.Chain] = [
        down[f"Chain_{level * (blocks + 1) + block + 2}"]
        for level in range(count)
        for block in range(blocks)
        if 2 * level >= count
    ]
    steps += [middle]
    steps += [up[f"Chain_{step + 1}"] for step in range((count // 2 + 1) * (blocks + 1))]
    for step in steps:
        last = [*step.layers(ResidualBlock)][-1]
        transformer = None if step is middle else step.find(SpatialTransformer)
        yield transformer or last, step


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel over positions: (B, C, h, w) to (B, C, 1, 1) each."""
    variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True, correction=0)
    return mean, variance.clamp(min=1e-6).sqrt()


def _check_style_cfg(value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"style_cfg is {value}, but should be from 0 (negative prompts do without) to 1 (like all)")


def _with_own_lists(context: Context) -> Context:
    """A copy that does not see what is taken from lists, or added to them, as the layers run."""
    return {key: [*value] if isinstance(value, list) else value for key, value in context.items()}


@dataclass(frozen=True)
class Noised:
    """A reference from clean latents, with the noise of each step of a model."""

    model: LatentDiffusionModel
    clean: Tensor
    noise: Tensor

    def __call__(self, index: int, count: int) -> Tensor:
        solver, step = self.model.solver, self.model.steps[index]
        return solver.scale_model_input(solver.add_noise(self.clean, self.noise, step), step)

    def copied(self, twins: Twins) -> Self:
        """The same for a copy of the model; for itself if it is another model's."""
        return replace(self, model=twins.get(self.model, self.model))
