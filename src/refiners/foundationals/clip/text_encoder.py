"""CLIP's text encoder (arXiv 2103.00020, section 2.4): a causal transformer over token ids.

Text, several texts, or token ids (B, L) to (B, L, embedding_dim), L up to max_sequence_length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.fluxion.context import placed
from refiners.fluxion.layers.module import single_output
from refiners.foundationals.clip.tokenizer import CLIPTokenizer


@dataclass(frozen=True)
class CLIPTextSpec:
    """The sizes of a text encoder.

    use_quick_gelu: whether the activation is x * sigmoid(1.702 x), as in OpenAI's models, rather than the exact one.
    pad_token_id: what fills up short texts; None for the end of text.
    """

    embedding_dim: int = 768
    max_sequence_length: int = 77
    vocabulary_size: int = 49408
    num_layers: int = 12
    num_attention_heads: int = 12
    feedforward_dim: int = 3072
    layer_norm_eps: float = 1e-5
    use_quick_gelu: bool = False
    pad_token_id: int | None = None


CLIP_L = CLIPTextSpec(use_quick_gelu=True)
CLIP_H_24 = CLIPTextSpec(
    embedding_dim=1024, num_layers=24, num_attention_heads=16, feedforward_dim=4096, pad_token_id=0
)
CLIP_H = CLIPTextSpec(  # Stable Diffusion 2 leaves out the last layer
    embedding_dim=1024, num_layers=23, num_attention_heads=16, feedforward_dim=4096, pad_token_id=0
)
CLIP_G = CLIPTextSpec(embedding_dim=1280, num_layers=32, num_attention_heads=20, feedforward_dim=5120, pad_token_id=0)


@single_output
class TokenEncoder(fl.Embedding):
    """A learned vector for each token id: (B, L) to (B, L, embedding_dim)."""


@single_output
class Positions(fl.Module):
    """The positions 0 … L - 1 of ids (B, L). Raises ValueError if L is above `max_sequence_length`."""

    def __init__(self, max_sequence_length: int) -> None:
        super().__init__()
        self.max_sequence_length = max_sequence_length

    def forward(self, token_ids: Tensor) -> Tensor:
        length = token_ids.shape[1]
        if length > self.max_sequence_length:
            raise ValueError(f"{length} token ids, but this encoder has only {self.max_sequence_length} positions")
        return torch.arange(length, device=token_ids.device)

    def extra_repr(self) -> str:
        return str(self.max_sequence_length)


class PositionalEncoder(fl.Chain):
    """A learned vector for each position of ids (B, L): (L, embedding_dim)."""

    def __init__(self, spec: CLIPTextSpec) -> None:
        super().__init__(
            Positions(spec.max_sequence_length),
            fl.Embedding(spec.max_sequence_length, spec.embedding_dim),
        )


class FeedForward(fl.Chain):
    """Two linear layers and an activation, at each position alone."""

    def __init__(self, spec: CLIPTextSpec) -> None:
        quick_or_exact = fl.GeLUApproximation.SIGMOID if spec.use_quick_gelu else fl.GeLUApproximation.NONE
        super().__init__(
            fl.Linear(spec.embedding_dim, spec.feedforward_dim),
            fl.GeLU(quick_or_exact),
            fl.Linear(spec.feedforward_dim, spec.embedding_dim),
        )


class TransformerLayer(fl.Chain):
    """Attention to what came before, then a perceptron, each normalised first and added to its input."""

    def __init__(self, spec: CLIPTextSpec) -> None:
        super().__init__(
            fl.Residual(
                fl.LayerNorm(spec.embedding_dim, eps=spec.layer_norm_eps),
                fl.SelfAttention(spec.embedding_dim, num_heads=spec.num_attention_heads, is_causal=True),
            ),
            fl.Residual(
                fl.LayerNorm(spec.embedding_dim, eps=spec.layer_norm_eps),
                FeedForward(spec),
            ),
        )


class CLIPTextEncoder(fl.Chain):
    """Text, several texts, or token ids (B, L), to a vector per token: (B, L, embedding_dim).

    tokenizer: None for one with CLIP's own vocabulary.
    """

    def __init__(
        self,
        spec: CLIPTextSpec = CLIP_L,
        tokenizer: CLIPTokenizer | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.spec = spec
        with placed(device, dtype):
            super().__init__(
                tokenizer or CLIPTokenizer(sequence_length=spec.max_sequence_length, pad_token_id=spec.pad_token_id),
                fl.Converter(set_dtype=False),
                fl.Sum(
                    TokenEncoder(spec.vocabulary_size, spec.embedding_dim),
                    PositionalEncoder(spec),
                ),
                *(TransformerLayer(spec) for _ in range(spec.num_layers)),
                fl.LayerNorm(spec.embedding_dim, eps=spec.layer_norm_eps),
            )


class CLIPTextEncoderL(CLIPTextEncoder):
    """CLIP ViT-L/14's, by OpenAI: of Stable Diffusion 1 and, as the first of two, of Stable Diffusion XL."""

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(CLIP_L, device=device, dtype=dtype)


class CLIPTextEncoderH(CLIPTextEncoder):
    """OpenCLIP ViT-H/14's without the last layer: of Stable Diffusion 2."""

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(CLIP_H, device=device, dtype=dtype)


class CLIPTextEncoderG(CLIPTextEncoder):
    """OpenCLIP ViT-bigG/14's: the second of Stable Diffusion XL."""

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(CLIP_G, device=device, dtype=dtype)
