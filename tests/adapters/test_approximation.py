"""Low-rank approximations are the best there are, lose what they say, and need no whole matrix for LoRAs."""

from typing import Any

import pytest
import torch
from torch import nn

from refiners.adapters.approximation import Limit, Spectrum, joined_factors, norm_of_product, spectrum_of
from refiners.adapters.difference import Difference
from refiners.adapters.embedding import EmbeddingLora
from refiners.adapters.lora import Conv2dLora, LinearLora


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(3)


def linear_lora(name: str, rank: int, scale: float = 1.0, alpha: float = 3.0) -> LinearLora:
    return LinearLora.from_weights(name, torch.randn(rank, 12), torch.randn(9, rank), scale, alpha)


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("is_product", [True, False])
def test_the_loss_is_that_of_the_values_cut_off_and_none_is_smaller(rank: int, is_product: bool) -> None:
    up, down = torch.randn(9, 8), torch.randn(8, 12)
    whole = up @ down
    spectrum = Spectrum.of_product(up, down) if is_product else Spectrum.of_matrix(whole)
    low, high = spectrum.factors(rank)
    values: Any = torch.linalg.svdvals(whole.double())
    best = values[rank:].norm().item()
    assert (whole - high @ low).double().norm().item() == pytest.approx(best, abs=1e-4)
    assert spectrum.lost(rank) == pytest.approx(best, abs=1e-4)
    assert spectrum.norm == pytest.approx(whole.norm().item(), rel=1e-6)
    assert (low.shape, high.shape) == ((rank, 12), (9, rank))
    torch.testing.assert_close(low.norm(), high.norm())  # as strong on both ways: neither leaves float16


def test_a_product_of_a_rank_above_the_sizes_is_cut_to_them() -> None:
    up, down = torch.randn(4, 20), torch.randn(20, 5)
    spectrum = Spectrum.of_product(up, down)
    low, high = spectrum.factors(spectrum.rank_within(Limit(30)))
    assert len(low) == 4
    torch.testing.assert_close((high @ low).float(), up @ down)


@pytest.mark.parametrize(
    ("limit", "rank"),
    [
        (Limit(2), 2),
        (Limit(99), 4),  # the fifth value is zero
        (Limit(energy=1.0), 4),
        (Limit(energy=0.9), 3),  # 16 + 9 of 30 are 0.83, and with 4 more 0.97
        (Limit(energy=0.5), 1),
        (Limit(2, 0.99), 2),
        (Limit(3, 0.5), 1),
    ],
)
def test_the_rank_is_the_least_that_keeps_the_energy(limit: Limit, rank: int) -> None:
    spectrum = Spectrum(torch.eye(6, 5), torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]), torch.eye(5))
    assert spectrum.rank_within(limit) == rank


def test_of_zero_the_rank_is_one() -> None:
    assert Spectrum.of_matrix(torch.zeros(3, 4)).rank_within(Limit(2, 0.9)) == 1


def test_loras_join_with_their_scales() -> None:
    weight, loras = torch.zeros(9, 12), [linear_lora("a", 2, -0.7), linear_lora("b", 3, 0.4, alpha=1.0)]
    joined = joined_factors(loras)
    assert joined is not None
    down, up = joined
    expected = sum(lora.delta_weight(weight) for lora in loras)
    assert down.shape == (5, 12)
    torch.testing.assert_close(up @ down, expected)
    assert norm_of_product(down, up) == pytest.approx(torch.as_tensor(expected).norm().item(), rel=1e-6)


def test_of_convolutions_kernels_and_tucker_cores_are_flattened() -> None:
    layer = nn.Conv2d(6, 8, 3)
    parts = {"down": torch.randn(2, 6, 1, 1), "mid": torch.randn(2, 2, 3, 3), "up": torch.randn(8, 2, 1, 1)}
    lora = Conv2dLora.from_parts(layer, "a", parts, alpha=0.5)
    spectrum = spectrum_of([lora], layer.weight)
    down, up = spectrum.factors(2)
    torch.testing.assert_close((up @ down).view(8, 6, 3, 3).float(), lora.delta_weight(layer.weight).detach())


def test_others_go_by_the_whole_matrix() -> None:
    lora, difference = linear_lora("a", 2), Difference("b", torch.randn(9, 12), scale=0.3)
    assert joined_factors([lora, difference]) is None
    assert joined_factors([]) is None
    spectrum = spectrum_of([lora, difference], torch.zeros(9, 12))
    down, up = spectrum.factors(9)
    expected = lora.delta_weight(torch.zeros(9, 12)) + difference.delta_weight(torch.zeros(9, 12))
    torch.testing.assert_close(up @ down, expected.detach())


def test_loras_of_embeddings_join() -> None:
    loras = [EmbeddingLora(name, torch.randn(2, 20), torch.randn(6, 2), scale=0.5, alpha=3.0) for name in "ab"]
    joined = joined_factors(loras)
    assert joined is not None
    expected = sum(lora.delta_weight(torch.zeros(20, 6)) for lora in loras)
    torch.testing.assert_close((joined[1] @ joined[0]).t(), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give a rank, an energy to keep, or both"),
        ({"rank": 0}, "at least 1, not 0"),
        ({"energy": 0.0}, "above 0 and up to 1, not 0.0"),
        ({"energy": 1.5}, "above 0 and up to 1, not 1.5"),
    ],
)
def test_limits_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limit(**options)  # type: ignore[arg-type]
