"""StyleAligned against diffusers' UNet with the formula of the paper written out in its attention."""

from typing import Any

import pytest
import torch
from steering_specimens import TIMESTEP, pair, predict, relative_error
from torch import Tensor
from torch.nn import functional

from refiners.foundationals.latent_diffusion import UNetSpec
from refiners.foundationals.latent_diffusion.steering import StyleAlignedAdapter

SPECS = {
    "as SD1": UNetSpec((16, 32), (1, 0), (2, 4), text_dim=16, norm_groups=8),
    "as SDXL": UNetSpec((16, 24, 32), (0, 1, 2), (2, 3, 4), 1, text_dim=16, norm_groups=8, has_linear_projection=True),
}


class TheirStyleAligned:
    """arXiv 2312.02133, section 3.2: shared attention with the queries and keys normalised to the reference's."""

    def __init__(self, scale: float, negatives: int) -> None:
        self.scale = scale
        self.negatives = negatives

    def __call__(self, attention: Any, h: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        is_self = encoder_hidden_states is None
        other = h if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attention.to_q(h), attention.to_k(other), attention.to_v(other)
        rows = [self._row(attention, q, k, v, index, is_self) for index in range(len(h))]
        return attention.to_out[0](torch.stack(rows))

    def _row(self, attention: Any, q: Tensor, k: Tensor, v: Tensor, index: int, is_self: bool) -> Tensor:
        first = 0 if index < self.negatives else self.negatives
        query, key, value = q[index], k[index], v[index]
        if is_self:
            query, key = adain(query, q[first]), adain(key, k[first])
            key, value = torch.cat([self.scale * k[first], key]), torch.cat([v[first], value])
        query, key, value = (x.unflatten(-1, (attention.heads, -1)).transpose(0, 1) for x in (query, key, value))
        return functional.scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1)


def adain(x: Tensor, other: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt() * (other.var(0) + 1e-5).sqrt() + other.mean(0)


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(("negatives", "scale"), [(0, 1.0), (2, 1.0), (2, 1.3), (4, 1.0)])
def test_the_prediction_equals_a_plain_computation(spec: UNetSpec, negatives: int, scale: float) -> None:
    ours, theirs = pair(spec)
    x, text = torch.randn(4, 4, 8, 8), torch.randn(4, 7, 16)
    without = predict(ours, x, text)
    StyleAlignedAdapter(ours, scale).inject()
    theirs.set_attn_processor(TheirStyleAligned(scale, negatives))
    expected = theirs(x, TIMESTEP, text).sample
    assert relative_error(predict(ours, x, text, negatives), expected) < 1e-5 < relative_error(without, expected) / 100


@torch.no_grad()
def test_the_first_picture_is_as_without_and_leads_the_others_alone() -> None:
    unet, _ = pair(SPECS["as SD1"])
    x, text = torch.randn(3, 4, 8, 8), torch.randn(3, 7, 16)
    without = predict(unet, x, text)
    adapter = StyleAlignedAdapter(unet).inject()
    together = predict(unet, x, text)
    assert relative_error(together[:1], without[:1]) < 1e-5 < relative_error(together[1:], without[1:])
    pairs = predict(unet, x[[0, 2]], text[[0, 2]])
    assert relative_error(pairs[1:], together[2:]) < 1e-5
    adapter.scale = 1.5
    assert adapter.scale == 1.5 and relative_error(predict(unet, x, text), together) > 1e-3
