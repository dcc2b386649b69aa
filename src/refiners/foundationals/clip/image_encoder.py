"""CLIP's image encoder (arXiv 2103.00020, section 2.4): a vision transformer (arXiv 2010.11929).

A picture, several, or pixels (B, 3, S, S) to one vector each, (B, projection_dim); its `grid_features` to a vector for
each patch and one for the whole, (B, 1 + (S / patch_size)², embedding_dim).
"""

from dataclasses import dataclass, replace

import torch

import refiners.fluxion.layers as fl
from refiners.fluxion.context import placed
from refiners.fluxion.layers.flattening import to_sequence
from refiners.foundationals.clip.pixels import Pixels
from refiners.foundationals.clip.transformer import TransformerLayer


@dataclass(frozen=True)
class CLIPImageSpec:
    """The sizes of an image encoder.

    image_size: side in pixels of what it sees.
    projection_dim: width of the vector for a picture, which is that of the text encoder of the same model.
    use_quick_gelu: whether the activation is x * sigmoid(1.702 x), as in OpenAI's models, rather than the exact one.
    """

    image_size: int = 224
    patch_size: int = 14
    embedding_dim: int = 1280
    num_layers: int = 32
    num_attention_heads: int = 16
    feedforward_dim: int = 5120
    projection_dim: int = 1024
    layer_norm_eps: float = 1e-5
    use_quick_gelu: bool = False

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size or self.num_layers < 2:
            raise ValueError(
                f"an image of side {self.image_size} should divide into patches of side {self.patch_size}, and there "
                f"should be at least 2 layers, not {self.num_layers}"
            )

    @property
    def num_positions(self) -> int:
        """The patches, and one for the picture as a whole."""
        return (self.image_size // self.patch_size) ** 2 + 1


CLIP_IMAGE_H = CLIPImageSpec()
CLIP_IMAGE_L = replace(
    CLIP_IMAGE_H,
    embedding_dim=1024,
    num_layers=24,
    feedforward_dim=4096,
    projection_dim=768,
    use_quick_gelu=True,
)
CLIP_IMAGE_G = replace(CLIP_IMAGE_H, embedding_dim=1664, num_layers=48, feedforward_dim=8192, projection_dim=1280)


class PatchEncoder(fl.Concatenate):
    """A learned vector for the picture as a whole, then one for each patch: (B, 3, S, S) to (B, L, embedding_dim)."""

    def __init__(self, spec: CLIPImageSpec) -> None:
        width, side = spec.embedding_dim, spec.patch_size
        super().__init__(
            fl.Chain(fl.Parameter(width), fl.Unsqueeze(1)),
            fl.Chain(fl.Conv2d(3, width, kernel_size=side, stride=side, use_bias=False), to_sequence()),
            dim=1,
        )


class PositionalEncoder(fl.Residual):
    """Adds a learned vector for each position: (B, L, embedding_dim) to the same."""

    def __init__(self, spec: CLIPImageSpec) -> None:
        super().__init__(fl.Parameter(spec.num_positions, spec.embedding_dim))


class PooledPicture(fl.Chain):
    """The vector for the picture as a whole, normalised and projected: (B, L, embedding_dim) to (B, projection_dim)."""

    def __init__(self, spec: CLIPImageSpec) -> None:
        super().__init__(
            fl.Slicing(dim=1, end=1),
            fl.Squeeze(1),
            fl.LayerNorm(spec.embedding_dim, eps=spec.layer_norm_eps),
            fl.Linear(spec.embedding_dim, spec.projection_dim, bias=False),
        )


class CLIPImageEncoder(fl.Chain):
    """A picture, several, or pixels (B, 3, S, S) as `Pixels` makes them, to a vector each: (B, projection_dim)."""

    def __init__(
        self,
        spec: CLIPImageSpec = CLIP_IMAGE_H,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.spec = spec
        with placed(device, dtype):
            super().__init__(
                Pixels(spec.image_size),
                fl.Converter(),
                PatchEncoder(spec),
                PositionalEncoder(spec),
                fl.LayerNorm(spec.embedding_dim, eps=spec.layer_norm_eps),
                *(TransformerLayer(spec, is_causal=False) for _ in range(spec.num_layers)),
                PooledPicture(spec),
            )

    def grid_features(self) -> fl.Chain:
        """What comes before the last layer, as a tree of its own with the same weights."""
        return self[:-2]


class CLIPImageEncoderH(CLIPImageEncoder):
    """OpenCLIP ViT-H/14's: of IP-Adapters for Stable Diffusion 1, and those for XL that say "vit-h"."""

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(CLIP_IMAGE_H, device=device, dtype=dtype)


class CLIPImageEncoderL(CLIPImageEncoder):
    """CLIP ViT-L/14's, by OpenAI."""

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(CLIP_IMAGE_L, device=device, dtype=dtype)


class CLIPImageEncoderG(CLIPImageEncoder):
    """OpenCLIP ViT-bigG/14's: of the first IP-Adapter for Stable Diffusion XL."""

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(CLIP_IMAGE_G, device=device, dtype=dtype)
