"""Decoupled cross-attention: the queries that read the text also read the tokens of pictures (arXiv 2308.06721, eq. 5).

Contexts, under the name of the IP-Adapter: "tokens", (n, P T, token_dim) for P pictures of T tokens each, n a divisor
of the batch; "masks", None or (m, P, H, W) likewise. From "flatten", the size of what the queries come from.
"""

from torch import Size, Tensor
from torch.nn import functional

import refiners.fluxion.layers as fl
from refiners.adapters.adapter import Adapter
from refiners.adapters.delta import repeated
from refiners.adapters.scaling import Scaling
from refiners.fluxion.layers.module import single_output


@single_output
class DecoupledAttention(fl.Sum, Adapter[fl.ScaledDotProductAttention]):
    """Adds attention over the tokens of pictures to attention over a text, before both are projected.

    token_dim: width of the tokens.  inner_dim: of queries, keys and values.
    """

    def __init__(self, target: fl.ScaledDotProductAttention, token_dim: int, inner_dim: int) -> None:
        with self.setup_adapter(target):
            super().__init__(target, ImageAttention(target.num_heads, token_dim, inner_dim))

    @property
    def image_attention(self) -> "ImageAttention":
        """What is added, whatever sits in the place of the target."""
        return self.layer(1, ImageAttention)


class ImageAttention(fl.Chain):
    """Attention of queries over the tokens of pictures, times a scale; the keys and values of the text are left out."""

    def __init__(self, num_heads: int, token_dim: int, inner_dim: int) -> None:
        super().__init__(
            fl.Parallel(
                fl.GetArg(0),
                TokenProjection(token_dim, inner_dim),
                TokenProjection(token_dim, inner_dim),
                fl.UseContext("IPAdapter", "masks"),
                fl.UseContext("flatten", "sizes").compose(_last),
            ),
            MaskedAttention(num_heads),
            Scaling(),
        )

    def start_from_text(self, attention: fl.Attention) -> None:
        """Take copies of the text's projections to keys and values, from which the authors start to train."""
        text = attention.Distribute.state_dict()
        own = {f"TokenProjection_{index}.Linear.weight": text[f"Linear_{index + 1}.weight"] for index in (1, 2)}
        self.Parallel.load_state_dict(own)

    @property
    def scaling(self) -> Scaling:
        """How strong it is."""
        return self.layer("Scaling", Scaling)

    @property
    def context(self) -> str:
        """Where the tokens come from."""
        return self.layer(("Parallel", "UseContext_1"), fl.UseContext).context

    @context.setter
    def context(self, name: str) -> None:
        for use in self.layers(fl.UseContext):
            use.context = use.context if use.key == "sizes" else name


class TokenProjection(fl.Chain):
    """The tokens, each as a key or a value: (n, T, token_dim) to (n, T, inner_dim)."""

    def __init__(self, token_dim: int, inner_dim: int) -> None:
        super().__init__(
            fl.UseContext("IPAdapter", "tokens"),
            fl.Linear(token_dim, inner_dim, bias=False),
        )


@single_output
class MaskedAttention(fl.ScaledDotProductAttention):
    """Attention over the tokens of several pictures: of all together, or of each alone where its mask lets it be seen.

    query (B, L, D); key, value (n, P T, D), n a divisor of B: each row serves B / n samples one after the other.
    masks: None, or (m, P, H, W), m a divisor of B.  size: height and width of what the L queries come from.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, masks: Tensor | None = None, size: Size | None = None
    ) -> Tensor:
        key, value = _for_samples(key, query.shape[0]), _for_samples(value, query.shape[0])
        if masks is None or size is None:
            return super().forward(query, key, value)
        count = masks.shape[1]
        weights = functional.interpolate(masks.float(), size=size, mode="bicubic").to(query.dtype)
        weights = repeated(weights.flatten(2)[..., None], query.shape[0])  # (B, P, L, 1)
        pictures = zip(key.chunk(count, dim=1), value.chunk(count, dim=1), weights.unbind(1), strict=True)
        seen = [super(MaskedAttention, self).forward(query, k, v) * weight for k, v, weight in pictures]
        return sum(seen[1:], start=seen[0])


def _for_samples(x: Tensor, batch_size: int) -> Tensor:
    rows = x.shape[0]
    if batch_size % rows:
        raise ValueError(
            f"the image prompts have {rows} rows, but the batch has {batch_size} samples, which is no multiple: "
            "compute one embedding for each picture, or one for all"
        )
    return x if rows == batch_size else x.repeat_interleave(batch_size // rows, dim=0)


def _last(sizes: list[Size]) -> Size:
    return sizes[-1]
