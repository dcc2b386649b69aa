"""The transformer layers of CLIP (arXiv 2103.00020, section 2.4): one for text, which looks back, one for pictures."""

from typing import Protocol

import refiners.fluxion.layers as fl


class TransformerSpec(Protocol):
    """What is asked of a spec."""

    @property
    def embedding_dim(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def feedforward_dim(self) -> int: ...
    @property
    def layer_norm_eps(self) -> float: ...
    @property
    def use_quick_gelu(self) -> bool: ...


class FeedForward(fl.Chain):
    """Two linear layers and an activation, at each position alone."""

    def __init__(self, spec: TransformerSpec) -> None:
        quick_or_exact = fl.GeLUApproximation.SIGMOID if spec.use_quick_gelu else fl.GeLUApproximation.NONE
        super().__init__(
            fl.Linear(spec.embedding_dim, spec.feedforward_dim),
            fl.GeLU(quick_or_exact),
            fl.Linear(spec.feedforward_dim, spec.embedding_dim),
        )


class TransformerLayer(fl.Chain):
    """Attention, then a perceptron, each normalised first and added to its input: (B, L, embedding_dim) to the same.

    is_causal: whether each position sees only what came before, as in a text.
    """

    def __init__(self, spec: TransformerSpec, is_causal: bool) -> None:
        super().__init__(
            fl.Residual(
                fl.LayerNorm(spec.embedding_dim, eps=spec.layer_norm_eps),
                fl.SelfAttention(spec.embedding_dim, num_heads=spec.num_attention_heads, is_causal=is_causal),
            ),
            fl.Residual(
                fl.LayerNorm(spec.embedding_dim, eps=spec.layer_norm_eps),
                FeedForward(spec),
            ),
        )
