"""From what an image encoder gives to tokens that a UNet reads as it reads a text.

IP-Adapters have one of three: `ImageProjection` (arXiv 2308.06721, section 3.2.1), and for the finer grid of patches
`FullImageProjection` or `PerceiverResampler` (its authors' code, github.com/tencent-ailab/IP-Adapter).
"""

from dataclasses import dataclass

from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.foundationals.clip.image_encoder import CLIP_IMAGE_H, CLIPImageEncoder


class ImageProjection(fl.Chain):
    """One vector for each picture to a few tokens: (B, image_dim) to (B, num_tokens, text_dim)."""

    def __init__(self, image_dim: int = 1024, text_dim: int = 768, num_tokens: int = 4) -> None:
        super().__init__(
            fl.Linear(image_dim, num_tokens * text_dim),
            fl.Reshape(num_tokens, text_dim),
            fl.LayerNorm(text_dim),
        )


class FullImageProjection(fl.Chain):
    """Each patch to a token: (B, T, image_dim) to (B, T, text_dim)."""

    def __init__(self, image_dim: int = 1280, text_dim: int = 768) -> None:
        super().__init__(
            fl.Linear(image_dim, image_dim),
            fl.GeLU(),
            fl.Linear(image_dim, text_dim),
            fl.LayerNorm(text_dim),
        )


@dataclass(frozen=True)
class ResamplerSpec:
    """The sizes of a `PerceiverResampler`.

    image_dim, text_dim: width of what comes in, and of the tokens.
    """

    image_dim: int = 1280
    text_dim: int = 768
    inner_dim: int = 768
    num_tokens: int = 16
    num_layers: int = 4
    num_heads: int = 12
    head_dim: int = 64
    feedforward_dim: int = 3072


class PerceiverResampler(fl.Chain):
    """Learned queries gather what matters from all patches: (B, T, image_dim) to (B, num_tokens, text_dim)."""

    def __init__(self, spec: ResamplerSpec) -> None:
        self.spec = spec
        super().__init__(
            fl.Linear(spec.image_dim, spec.inner_dim),
            fl.SetContext("perceiver_resampler", "patches"),
            fl.Parameter(1, spec.num_tokens, spec.inner_dim),  # with a batch dimension, as in files
            fl.Flatten(1, 2),
            *(ResamplerLayer(spec) for _ in range(spec.num_layers)),
            fl.Linear(spec.inner_dim, spec.text_dim),
            fl.LayerNorm(spec.text_dim),
        )


class ResamplerLayer(fl.Chain):
    """Attention of the tokens to the patches and themselves, then a perceptron: (B, num_tokens, inner_dim) to same."""

    def __init__(self, spec: ResamplerSpec) -> None:
        attention_dim = spec.num_heads * spec.head_dim
        super().__init__(
            fl.Residual(
                fl.LayerNorm(spec.inner_dim),
                fl.Parallel(
                    fl.Linear(spec.inner_dim, attention_dim, bias=False),
                    fl.Chain(PatchesAndTokens(spec), fl.Linear(spec.inner_dim, 2 * attention_dim, bias=False)),
                ),
                fl.Lambda(_with_keys_and_values_apart),
                fl.ScaledDotProductAttention(spec.num_heads),
                fl.Linear(attention_dim, spec.inner_dim, bias=False),
            ),
            fl.Residual(
                fl.LayerNorm(spec.inner_dim),
                fl.Linear(spec.inner_dim, spec.feedforward_dim, bias=False),
                fl.GeLU(),
                fl.Linear(spec.feedforward_dim, spec.inner_dim, bias=False),
            ),
        )


class PatchesAndTokens(fl.Concatenate):
    """The patches, normalised, and after them the tokens."""

    def __init__(self, spec: ResamplerSpec) -> None:
        super().__init__(
            fl.Chain(fl.UseContext("perceiver_resampler", "patches"), fl.LayerNorm(spec.inner_dim)),
            fl.Identity(),
            dim=1,
        )


def sees_grid(projection: fl.Chain) -> bool:
    """Whether a projection takes a vector for each patch of a picture, rather than one for all."""
    return isinstance(projection, FullImageProjection | PerceiverResampler)


def new_projection(encoder: fl.Chain | None, text_dim: int, fine_grained: bool) -> fl.Chain:
    """A projection for an image encoder, None for CLIP's of size H. Raises ValueError if it is none of CLIP's."""
    if encoder is not None and not isinstance(encoder, CLIPImageEncoder):
        raise ValueError(
            f"what is to come after a {type(encoder).__name__} cannot be told: give image_proj, such as "
            "ImageProjection with the width of its vectors"
        )
    spec = CLIP_IMAGE_H if encoder is None else encoder.spec
    if not fine_grained:
        return ImageProjection(spec.projection_dim, text_dim)
    inner_dim = min(text_dim, 1280)
    num_heads = inner_dim // ResamplerSpec.head_dim
    return PerceiverResampler(
        ResamplerSpec(spec.embedding_dim, text_dim, inner_dim, num_heads=num_heads, feedforward_dim=4 * inner_dim)
    )


def _with_keys_and_values_apart(queries: Tensor, keys_and_values: Tensor) -> tuple[Tensor, ...]:
    return queries, *keys_and_values.chunk(2, dim=-1)
