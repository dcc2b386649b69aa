"""Reference-only control: the picture attends to a reference picture at the same level of noise as well.

From discussion 1236 of Mikubill/sd-webui-controlnet; no weights of its own are needed.
"""

from collections.abc import Callable
from functools import partial
from typing import Self

import torch
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.adapters.adapter import Adapter
from refiners.adapters.scaling import Scaling
from refiners.fluxion.context import Context, Contexts, placed
from refiners.foundationals.latent_diffusion.model import LatentDiffusionModel
from refiners.foundationals.latent_diffusion.participant import Participant
from refiners.foundationals.latent_diffusion.steering.self_attentions import self_attentions
from refiners.foundationals.latent_diffusion.steering.steering import Steering
from refiners.foundationals.latent_diffusion.unet import HasUNet, UNet, unet_of
from refiners.solvers.solver import Generators, unit_noise

CONTEXT = "reference_only"

# Latents (1 or B, 4, h, w) at the level of a step, of its number, 0 … count - 1, and how many there are.
Reference = Callable[[int, int], Tensor]


class ReferenceOnlyControlAdapter(Steering):
    """Runs the UNet on a reference too, in each call, and lets every self-attention see the reference's positions.

    target: a UNet, or a model with one.
    style_cfg: how much of it the predictions for negative prompts get, 0 … 1; less makes guidance lead to it.
    """

    def __init__(self, target: UNet | HasUNet, style_cfg: float = 0.5) -> None:
        unet = unet_of(target)
        with placed(unet.device):
            self._attentions = [
                (ReferencedAttention(place.product, style_cfg), place.attention) for place in self_attentions(unet)
            ]
        super().__init__(self._attentions)
        self.unet = unet
        self._run = ReferenceRun()

    def set_controlnet_condition(self, condition: Tensor | Reference) -> None:
        """Set the reference of all calls from now on.

        condition: latents (1 or B, 4, h, w) with the noise of the step to come, or a function that gives them for each.
        """
        self._run.set_reference(condition)

    def set_reference(self, model: LatentDiffusionModel, clean: Tensor, generator: Generators = None) -> None:
        """Set the reference of all calls from now on: clean latents, which get the noise of each step of the model."""
        self._run.set_reference(partial(_noised, model, clean, unit_noise(clean, generator)))

    @property
    def style_cfg(self) -> float:
        """How much of it the predictions for negative prompts get. What was compiled stays good."""
        return self._attentions[0][0].Scaling.scale

    @style_cfg.setter
    def style_cfg(self, value: float) -> None:
        for attention, _ in self._attentions:
            attention.Scaling.scale = value

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
        """Take the reference of the calls to come, or the rule for it."""
        self._reference, self._reference_at = (reference, None) if isinstance(reference, Tensor) else (None, reference)

    def before_step(self, index: int, count: int) -> None:
        """Get the reference of a step."""
        if self._reference_at is not None:
            self._reference = self._reference_at(index, count)

    def init_context(self) -> Contexts:
        return {CONTEXT: {"is_reference": False, "seen": []}}

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
        count, channels = reference.shape[:2]
        further = x[:, channels:]
        is_whole = further.shape[1] == 0
        if x.shape[0] % count or channels > x.shape[1] or not (is_whole or reference.shape[2:] == x.shape[2:]):
            raise ValueError(
                f"the reference is {tuple(reference.shape)}, but the latents are {tuple(x.shape)}: give one for all "
                "pictures or one for each, and to an inpainting model one of the same size"
            )
        repeated = reference.repeat(x.shape[0] // count, 1, 1, 1)
        return repeated if is_whole else torch.cat([repeated, further], dim=1)


class ReferencedAttention(fl.Chain, Adapter[fl.ScaledDotProductAttention]):
    """Keeps keys and values of the reference, and then lets the picture's queries see them too."""

    def __init__(self, target: fl.ScaledDotProductAttention, style_cfg: float) -> None:
        with self.setup_adapter(target):
            super().__init__(target, fl.Return(), Scaling(style_cfg))

    def forward(self, *inputs: Tensor) -> Tensor:
        (query, key, value), context = inputs, self.use_context(CONTEXT)
        if context["is_reference"]:
            context["seen"].append((key, value))
            return super().forward(query, key, value)
        seen_key, seen_value = context["seen"].pop(0)
        h = super().forward(query, torch.cat([seen_key, key], dim=1), torch.cat([seen_value, value], dim=1))
        count = self.use_context("diffusion").get("negatives", 0)
        if count == 0:
            return h
        alone = super().forward(query[:count], key[:count], value[:count])
        return torch.cat([alone + self.Scaling(h[:count] - alone), h[count:]])


def _with_own_lists(context: Context) -> Context:
    """A copy that does not see what is taken from lists, or added to them, as the layers run."""
    return {key: [*value] if isinstance(value, list) else value for key, value in context.items()}


def _noised(model: LatentDiffusionModel, clean: Tensor, noise: Tensor, index: int, count: int) -> Tensor:
    step = model.steps[index]
    return model.solver.scale_model_input(model.solver.add_noise(clean, noise, step), step)
