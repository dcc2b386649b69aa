"""One call of a UNet with all that it is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from refiners.fluxion.context import Context
from refiners.foundationals.latent_diffusion.unet import UNet


@dataclass(frozen=True)
class UNetCall:
    """What a UNet is called with.

    x: (B, C, h, w).  timestep: (1,).  conditions: each of batch B.  contexts: what else is set.
    """

    x: Tensor
    timestep: Tensor
    conditions: Mapping[str, Tensor]
    contexts: Mapping[str, Context]

    def run(self, unet: UNet) -> Tensor:
        """What the UNet predicts, (B, C', h, w)."""
        unet.set_timestep(self.timestep.expand(self.x.shape[0]))  # one for each, as LoRAs may have a scale for each
        unet.set_conditions(self.conditions)
        for name, values in self.contexts.items():
            unet.set_context(name, values)
        return unet(self.x)


class UNetRunner(Protocol):
    """What calls the UNet in a model's place."""

    def run(self, call: UNetCall) -> Tensor:
        """The prediction for a call that the model wants to make, (B, C', h, w)."""
        ...


def check_one_for_each(what: str, count: int, batch: int, diffusion: Context) -> None:
    """Raise ValueError if there are neither one of something for all pictures of a batch, nor one for each.

    diffusion: the context of that name, which tells how many of the batch are for negative prompts. With several
    windows in a batch there is one for each row already.
    """
    pictures = batch - diffusion.get("negatives", 0)
    if diffusion.get("windows", 1) == 1 and (pictures or batch) % count:
        raise ValueError(
            f"there are {what} for {count} pictures, but {pictures or batch} are made: give one for all or for each"
        )
