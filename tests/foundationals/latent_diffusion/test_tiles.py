"""Tiles: of a network that looks at one place at a time they blend to the whole, of an autoencoder to nearly that."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.tiles import run_in_tiles
from refiners.foundationals.scenes import Scene, Scenes, Thing, draw_scenes


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (13, 30), (40, 17)])
def test_tiles_of_a_local_network_blend_to_the_whole(size: tuple[int, int]) -> None:
    seen: list[tuple[int, ...]] = []

    def network(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[2:]))
        return functional.interpolate(x[:, :3] * 2 + 1, scale_factor=4.0)

    x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    whole = network(x)
    seen.clear()
    torch.testing.assert_close(run_in_tiles(network, x, 32, pixels_before=4), whole, rtol=1e-5, atol=1e-5)
    assert all(max(tile) <= 8 for tile in seen)
    assert (len(seen) == 1) == (max(size) <= 8)


@pytest.mark.parametrize("size", [(32, 32), (36, 32), (52, 120)])
def test_tiles_of_a_network_that_makes_pictures_smaller_blend_to_the_whole(size: tuple[int, int]) -> None:
    seen: list[tuple[int, ...]] = []

    def network(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[2:]))
        return functional.avg_pool2d(x, 4) * 2 + 1

    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    whole = network(x)
    seen.clear()
    torch.testing.assert_close(run_in_tiles(network, x, 32, pixels_after=4), whole, rtol=1e-5, atol=1e-5)
    assert all(max(tile) <= 32 for tile in seen)


def test_tiles_of_the_embedded_autoencoder_are_near_the_whole() -> None:
    """With attention and norms that see a tile only: 40 dB and more, where the autoencoder itself keeps 30."""
    generator = torch.Generator().manual_seed(0)
    things = [(Thing("red", "circle"), None, Thing("blue", "square"), None), (None, Thing("green", "star"), None, None)]
    scenes = [Scene(things[index % 2], "white") for index in range(16)]
    pictures = draw_scenes(Scenes.from_list(scenes), generator)
    picture = pictures.unflatten(0, (4, 4)).permute(2, 0, 3, 1, 4).reshape(1, 3, 128, 128)
    lda = StableDiffusion_1.from_pretrained("builtin").lda
    with torch.no_grad():
        latents = lda.encode(picture)
        whole, tiled = lda.decode(latents), lda.decode(latents, tile_size=64)
        tiled_latents = lda.encode(picture, tile_size=64)
    error = (whole - tiled).square().mean()
    assert 0 < error < 4 * 10**-3.8  # values go from -1 to 1
    assert 0 < (latents - tiled_latents).square().mean() < 0.01 * latents.square().mean()
