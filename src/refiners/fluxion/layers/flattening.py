"""Pictures to sequences of their positions and back; a context remembers the sizes, so that blocks nest.

(B, C, H, W) to (B, H * W, C) and back. Whoever uses these has `{"flatten": {"sizes": []}}` in its `init_context`.
"""

from torch import Size, Tensor

from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.combinators import Parallel
from refiners.fluxion.layers.contexts import SetContext, UseContext
from refiners.fluxion.layers.functional import Identity, Lambda
from refiners.fluxion.layers.module import Module
from refiners.fluxion.layers.shapes import Unflatten


def keep_size() -> Module:
    """A layer that remembers the size of the picture that passes, for `to_picture`."""
    return SetContext("flatten", "sizes", callback=_push_size)


def to_sequence() -> Module:
    """A layer from a picture to the sequence of its positions."""
    return Lambda(_to_sequence)


def to_picture() -> Chain:
    """Layers from a sequence to the picture of the size that was remembered last."""
    return Chain(
        Lambda(_channels_first),
        Parallel(Identity(), UseContext("flatten", "sizes").compose(_pop_size)),
        Unflatten(dim=-1),
    )


def _push_size(sizes: list[Size], x: Tensor) -> None:
    sizes.append(x.shape[2:])


def _pop_size(sizes: list[Size]) -> Size:
    return sizes.pop()


def _to_sequence(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _channels_first(x: Tensor) -> Tensor:
    # A mere view would have the strides of torch.channels_last, and each convolution that comes later would copy its
    # weights to match: a step of Stable Diffusion took a third longer on the CPU.
    return x.transpose(1, 2).contiguous()
