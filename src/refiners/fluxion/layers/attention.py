"""Multi-head attention as a tree: projections, scaled dot products, projection (arXiv 1706.03762, section 3.2)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from refiners.fluxion.context import Contexts, placed
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.combinators import Distribute, Parallel
from refiners.fluxion.layers.flattening import keep_size, to_picture, to_sequence
from refiners.fluxion.layers.functional import Identity
from refiners.fluxion.layers.linear import Linear
from refiners.fluxion.layers.module import Module, single_output


@single_output
class ScaledDotProductAttention(Module):
    """softmax(Q K^T / sqrt(d)) V in `num_heads` heads of d = D / num_heads dimensions each.

    query (B, L, D), key (B, S, D), value (B, S, E) to (B, L, E).

    is_causal: each position sees only those up to its own.
    is_optimized: use torch's fused kernels; False computes the formula step by step, which gives the same.
    slice_size: attend that many queries at a time, for less memory in the step-by-step form (no use when causal).
    """

    def __init__(
        self,
        num_heads: int = 1,
        is_causal: bool | None = False,
        is_optimized: bool = True,
        slice_size: int | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"attention needs at least 1 head, not {num_heads}")
        if slice_size is not None and (slice_size < 1 or is_causal):
            raise ValueError(f"slice_size={slice_size} must be at least 1, and does not go with is_causal={is_causal}")
        self.num_heads = num_heads
        self.is_causal = bool(is_causal)  # None, the last Refiners' default, is no
        self.is_optimized = is_optimized
        self.slice_size = slice_size

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = self._split_heads(query), self._split_heads(key), self._split_heads(value)
        parts = (q,) if self.slice_size is None else torch.split(q, self.slice_size, dim=2)
        heads = [self._attend(part, k, v) for part in parts]
        h = heads[0] if len(heads) == 1 else torch.cat(heads, dim=2)
        return h.transpose(1, 2).flatten(2)

    def _split_heads(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[-1] % self.num_heads:
            raise ValueError(
                f"attention of {self.num_heads} heads takes (B, L, D), D divisible by that, not {tuple(x.shape)}"
            )
        heads = torch.unflatten(x, -1, (self.num_heads, -1))
        return heads.transpose(1, 2)  # (B, heads, L, d)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.is_optimized:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if self.is_causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return scores.softmax(dim=-1) @ v

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}" + (", is_causal=True" if self.is_causal else "")


class Attention(Chain):
    """Multi-head attention of a query over keys and values, each projected; takes three inputs.

    query (B, L, embedding_dim), key (B, S, key_embedding_dim), value (B, S, value_embedding_dim) to
    (B, L, embedding_dim). Dimensions that are not given are embedding_dim.

    inner_dim: width of the projected queries, keys and values, all heads together.
    use_bias: whether the three input projections have a bias; the output projection always has one.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int = 1,
        key_embedding_dim: int | None = None,
        value_embedding_dim: int | None = None,
        inner_dim: int | None = None,
        use_bias: bool = True,
        is_causal: bool | None = False,
        is_optimized: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.embedding_dim = embedding_dim
        self.num_heads = num_heads
        self.key_embedding_dim = key_embedding_dim or embedding_dim
        self.value_embedding_dim = value_embedding_dim or embedding_dim
        self.inner_dim = inner_dim or embedding_dim
        self.use_bias = use_bias
        self.is_causal = bool(is_causal)
        self.is_optimized = is_optimized
        if num_heads < 1 or self.inner_dim % num_heads:
            raise ValueError(f"the inner dimension {self.inner_dim} does not divide into {num_heads} heads")
        with placed(device, dtype):
            super().__init__(
                Distribute(
                    Linear(self.embedding_dim, self.inner_dim, bias=use_bias),
                    Linear(self.key_embedding_dim, self.inner_dim, bias=use_bias),
                    Linear(self.value_embedding_dim, self.inner_dim, bias=use_bias),
                ),
                ScaledDotProductAttention(num_heads, is_causal=is_causal, is_optimized=is_optimized),
                Linear(self.inner_dim, self.embedding_dim),
            )


class SelfAttention(Attention):
    """Multi-head attention of a sequence over itself: (B, L, embedding_dim) to the same shape."""

    def __init__(
        self,
        embedding_dim: int,
        inner_dim: int | None = None,
        num_heads: int = 1,
        use_bias: bool = True,
        is_causal: bool | None = False,
        is_optimized: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embedding_dim=embedding_dim,
            inner_dim=inner_dim,
            num_heads=num_heads,
            use_bias=use_bias,
            is_causal=is_causal,
            is_optimized=is_optimized,
            device=device,
            dtype=dtype,
        )
        self.insert(0, Parallel(Identity(), Identity(), Identity()))


class SelfAttention2d(SelfAttention):
    """Multi-head attention of all positions of a picture over one another: (B, channels, H, W) to the same shape."""

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        use_bias: bool = True,
        is_causal: bool | None = False,
        is_optimized: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.channels = channels
        super().__init__(
            embedding_dim=channels,
            num_heads=num_heads,
            use_bias=use_bias,
            is_causal=is_causal,
            is_optimized=is_optimized,
            device=device,
            dtype=dtype,
        )
        self.insert(0, keep_size())
        self.insert(1, to_sequence())
        self.append(to_picture())

    def init_context(self) -> Contexts:
        return {"flatten": {"sizes": []}}
