"""What a module in the tree of a UNet can do to take part in its calls."""

from collections.abc import Mapping

from torch import Tensor

from refiners.foundationals.latent_diffusion.copies import Twins


class Participant:
    """A base, besides that of a layer, for adapters and others in a UNet that depend on the step or bring conditions.

    `UNet.participants` finds them. They override what they need; the rest does nothing.
    """

    def before_step(self, index: int, count: int) -> None:
        """Get ready for the step of that number, 0 … count - 1, before the UNet runs."""

    def settle(self, twins: Twins) -> None:
        """Turn to the counterparts of what this knows of the model, as it is in a copy of that now."""

    @property
    def conditions(self) -> Mapping[str, Tensor]:
        """What the UNet is told besides, by "context.key": of batch 2 P or 2, negative ones first, as all are."""
        return {}

    @property
    def spatial_conditions(self) -> Mapping[str, Tensor]:
        """What covers the picture, by "context.key": (P, C, H, W), P a divisor of the number of pictures.

        Where the UNet sees a part of a picture, the same part of these is set in its place.
        """
        return {}
