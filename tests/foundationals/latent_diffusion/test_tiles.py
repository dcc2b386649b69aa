"""Tiles: where a network looks at one place at a time, the blend of its tiles is what it gives for the whole."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from refiners.foundationals.latent_diffusion.tiles import run_in_tiles


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (13, 30), (40, 17)])
def test_tiles_of_a_local_network_blend_to_the_whole(size: tuple[int, int]) -> None:
    seen: list[tuple[int, ...]] = []

    def network(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[2:]))
        return functional.interpolate(x[:, :3] * 2 + 1, scale_factor=4.0)

    x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    whole = network(x)
    seen.clear()
    torch.testing.assert_close(run_in_tiles(network, x, factor=4, tile_size=32), whole, rtol=1e-5, atol=1e-5)
    assert all(max(tile) <= 8 for tile in seen)
    assert (len(seen) == 1) == (max(size) <= 8)
