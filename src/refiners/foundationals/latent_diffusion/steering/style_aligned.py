"""StyleAligned (arXiv 2312.02133): all pictures of a batch take on the style of the first one."""

import torch
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.adapters.delta import Scale
from refiners.adapters.scaling import Scaling
from refiners.fluxion.context import placed
from refiners.foundationals.latent_diffusion.steering.self_attentions import self_attentions
from refiners.foundationals.latent_diffusion.steering.steering import Preceded, Steering
from refiners.foundationals.latent_diffusion.unet import HasUNet, UNet, unet_of


class StyleAlignedAdapter(Steering):
    """Lets every picture of a batch attend to the first one too; negative prompts and prompts are apart.

    target: a UNet, or a model with one.
    scale: of the first picture's keys, 1 in the paper; above it the others follow it more closely.
    """

    def __init__(self, target: UNet | HasUNet, scale: Scale = 1.0) -> None:
        unet = unet_of(target)
        with placed(unet.device):
            self._shared = [(SharedAttention(scale), place) for place in self_attentions(unet)]
        super().__init__((Preceded(layer, place.product), place.attention) for layer, place in self._shared)

    @property
    def scale(self) -> Scale:
        """Of the first picture's keys. What was compiled stays good."""
        return self._shared[0][0].ensure_find(Scaling).scale

    @scale.setter
    def scale(self, value: Scale) -> None:
        for layer, _ in self._shared:
            layer.ensure_find(Scaling).scale = value


class SharedAttention(fl.Parallel):
    """Queries, keys and values (B, L, D) to (B, L, D), (B, 2 L, D), (B, 2 L, D), the first picture's before its own."""

    def __init__(self, scale: Scale) -> None:
        super().__init__(
            fl.Chain(
                fl.GetArg(0),
                Aligned(),
            ),
            fl.Chain(
                fl.GetArg(1),
                Aligned(),
                fl.Concatenate(fl.Chain(FirstOfHalf(), Scaling(scale)), fl.Identity(), dim=1),
            ),
            fl.Chain(
                fl.GetArg(2),
                fl.Concatenate(FirstOfHalf(), fl.Identity(), dim=1),
            ),
        )


class FirstOfHalf(fl.ContextModule):
    """The first of the samples for negative prompts, and of those for prompts, for all of them: (B, …) to the same.

    Where the batch has several windows of the pictures (MultiDiffusion), it is the first one of each window.
    """

    def forward(self, x: Tensor) -> Tensor:
        context = self.use_context("diffusion")
        count, windows = context.get("negatives", 0), context.get("windows", 1)
        halves = (x[:count], x[count:])
        return torch.cat([_first_of_each(half, windows) for half in halves if len(half)])


def _first_of_each(x: Tensor, windows: int) -> Tensor:
    rows = x.reshape(windows, -1, *x.shape[1:])
    return rows[:, :1].expand_as(rows).flatten(0, 1)


class Aligned(fl.Chain):
    """Each channel over the positions gets the mean and deviation that it has in the first sample: (B, L, D)."""

    def __init__(self) -> None:
        super().__init__(fl.Parallel(fl.Identity(), FirstOfHalf()), fl.Lambda(with_statistics_of))


def with_statistics_of(x: Tensor, other: Tensor) -> Tensor:
    """Adaptive instance normalisation (arXiv 1703.06868, eq. 8) over the positions: (B, L, D) to the same."""
    (deviation, mean), (other_deviation, other_mean) = _statistics(x), _statistics(other)
    return (x - mean) / deviation * other_deviation + other_mean


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x, dim=1, keepdim=True)
    return (variance + 1e-5).sqrt(), mean
