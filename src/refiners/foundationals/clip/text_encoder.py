"""CLIP's text encoder (arXiv 2103.00020, section 2.4): a causal transformer over token ids.

Text, several texts, or token ids (B, L) to (B, L, embedding_dim), L up to max_sequence_length; with a projection, to
a pair of that and (B, projection_dim).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.fluxion.context import placed
from refiners.fluxion.layers.module import single_output
from refiners.foundationals.clip.tokenizer import CLIPTokenizer
from refiners.foundationals.clip.transformer import TransformerLayer


@dataclass(frozen=True)
class CLIPTextSpec:
    """The sizes of a text encoder.

    use_quick_gelu: whether the activation is x * sigmoid(1.702 x), as in OpenAI's models, rather than the exact one.
    pad_token_id: what fills up short texts; None for the end of text.
    skipped_layers: how many of the last layers, and then the last norm too, do not count for the vectors of tokens.
    projection_dim: width of a vector for the text as a whole, given besides: what all layers make of the end of the
        text, projected (arXiv 2103.00020, figure 3); 0 for none.
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
    skipped_layers: int = 0
    projection_dim: int = 0

    def __post_init__(self) -> None:
        if not self.projection_dim and not self.skipped_layers:
            return
        if not 0 < self.skipped_layers < self.num_layers:
            raise ValueError(
                f"skipped_layers is {self.skipped_layers}, but with {self.num_layers} layers and a projection of "
                f"{self.projection_dim} it should be 1 … {self.num_layers - 1}"
            )

    @property
    def trunk_layers(self) -> int:
        """How many layers count for the vectors of tokens."""
        return self.num_layers - self.skipped_layers

    @property
    def end_token_id(self) -> int:
        """The last id of the vocabulary ends a text."""
        return self.vocabulary_size - 1


CLIP_L = CLIPTextSpec(use_quick_gelu=True)
CLIP_H_24 = CLIPTextSpec(
    embedding_dim=1024, num_layers=24, num_attention_heads=16, feedforward_dim=4096, pad_token_id=0
)
CLIP_H = CLIPTextSpec(  # Stable Diffusion 2 leaves out the last layer
    embedding_dim=1024, num_layers=23, num_attention_heads=16, feedforward_dim=4096, pad_token_id=0
)
CLIP_G = CLIPTextSpec(embedding_dim=1280, num_layers=32, num_attention_heads=20, feedforward_dim=5120, pad_token_id=0)
# Stable Diffusion XL reads both one layer before the last (arXiv 2307.01952, section 2.1)
SDXL_CLIP_L = replace(CLIP_L, skipped_layers=1)
SDXL_CLIP_G = replace(CLIP_G, skipped_layers=1, projection_dim=1280)


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


class EndOfText(fl.Module):
    """The vectors (B, D) of those at the first end of the text: of vectors (B, L, D) and ids (B, L)."""

    def __init__(self, end_token_id: int) -> None:
        super().__init__()
        self.end_token_id = end_token_id

    def forward(self, vectors: Tensor, token_ids: Tensor) -> Tensor:
        positions = (token_ids == self.end_token_id).int().argmax(dim=-1)
        return vectors[torch.arange(vectors.shape[0], device=vectors.device), positions]

    def extra_repr(self) -> str:
        return str(self.end_token_id)


class PooledText(fl.Chain):
    """The layers that are left, the last norm, and a projection of the end of the text: (B, L, D) to (B, P)."""

    def __init__(self, spec: CLIPTextSpec) -> None:
        super().__init__(
            *(TransformerLayer(spec, is_causal=True) for _ in range(spec.skipped_layers)),
            fl.LayerNorm(spec.embedding_dim, eps=spec.layer_norm_eps),
            fl.Parallel(fl.Identity(), fl.UseContext("clip_text_encoder", "token_ids")),
            EndOfText(spec.end_token_id),
            fl.Linear(spec.embedding_dim, spec.projection_dim, bias=False),
        )


def _tail(spec: CLIPTextSpec) -> list[fl.Module]:
    """What follows the layers that count for the vectors of tokens."""
    last_norm = fl.LayerNorm(spec.embedding_dim, eps=spec.layer_norm_eps)
    if spec.projection_dim:
        return [fl.Parallel(fl.Identity(), PooledText(spec))]
    if spec.skipped_layers:  # they do not run, but are kept, as they are in files
        return [fl.Return(), *(TransformerLayer(spec, is_causal=True) for _ in range(spec.skipped_layers)), last_norm]
    return [last_norm]


class CLIPTextEncoder(fl.Chain):
    """Text, several texts, or token ids (B, L), to a vector per token: (B, L, embedding_dim).

    With a projection: to a pair of those and of a vector for each text, (B, projection_dim).

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
                *([fl.SetContext("clip_text_encoder", "token_ids")] if spec.projection_dim else []),
                fl.Sum(
                    TokenEncoder(spec.vocabulary_size, spec.embedding_dim),
                    PositionalEncoder(spec),
                ),
                *(TransformerLayer(spec, is_causal=True) for _ in range(spec.trunk_layers)),
                *_tail(spec),
            )


class CLIPTextEncoderL(CLIPTextEncoder):
    """CLIP ViT-L/14's, by OpenAI: of Stable Diffusion 1."""

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(CLIP_L, device=device, dtype=dtype)


class CLIPTextEncoderH(CLIPTextEncoder):
    """OpenCLIP ViT-H/14's without the last layer: of Stable Diffusion 2."""

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(CLIP_H, device=device, dtype=dtype)


class CLIPTextEncoderG(CLIPTextEncoder):
    """OpenCLIP ViT-bigG/14's, without the projection."""

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(CLIP_G, device=device, dtype=dtype)
