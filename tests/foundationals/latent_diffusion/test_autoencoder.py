"""The autoencoder against diffusers' `AutoencoderKL` at random, non-trivial weights."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from refiners.foundationals.latent_diffusion import AutoencoderSpec, LatentDiffusionAutoencoder
from refiners.foundationals.latent_diffusion.autoencoder import SD1_AUTOENCODER
from refiners.foundationals.latent_diffusion.autoencoder_names import diffusers_names, single_file_names

SPECS = {
    "two levels": AutoencoderSpec(channels=(16, 32), norm_groups=8),
    "four levels, one block, three latent channels": AutoencoderSpec(
        channels=(8, 16, 24, 24), blocks_per_level=1, latent_channels=3, norm_groups=4
    ),
}


def reference(spec: AutoencoderSpec) -> AutoencoderKL:
    levels = len(spec.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=spec.channels,
        layers_per_block=spec.blocks_per_level,
        latent_channels=spec.latent_channels,
        norm_num_groups=spec.norm_groups,
        scaling_factor=spec.latent_scale,
    )


def randomize(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
        else:
            nn.init.normal_(parameter, mean=0.3, std=0.3)


def pair(spec: AutoencoderSpec) -> tuple[LatentDiffusionAutoencoder, Any]:
    torch.manual_seed(0)
    theirs, ours, names = reference(spec), LatentDiffusionAutoencoder(spec), diffusers_names(spec)
    randomize(theirs)
    ours.load_state_dict({str(names.to_ours(key)): tensor for key, tensor in theirs.state_dict().items()})
    return ours, theirs


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_encoding_and_decoding_equal_diffusers(spec: AutoencoderSpec) -> None:
    ours, theirs = pair(spec)
    factor = spec.downsampling_factor
    pictures = torch.rand(2, 3, 3 * factor, 4 * factor) * 2 - 1
    with torch.no_grad():
        moments = theirs.encode(pictures).latent_dist
        latents = torch.randn(2, spec.latent_channels, 3, 4)
        assert relative_error(ours.encode(pictures), moments.mean * spec.latent_scale) < 1e-5
        noise = torch.randn_like(moments.mean)
        sample = (moments.mean + moments.std * noise) * spec.latent_scale
        assert relative_error(ours.encode(pictures, noise), sample) < 1e-5
        decoded = theirs.decode(latents / spec.latent_scale).sample
        assert relative_error(ours.decode(latents), decoded) < 1e-5


def test_gradients_equal_diffusers() -> None:
    spec = SPECS["two levels"]
    ours, theirs = pair(spec)
    pictures = torch.rand(1, 3, 8, 8) * 2 - 1
    ours(pictures).square().mean().backward()
    theirs.decode(theirs.encode(pictures).latent_dist.mean).sample.square().mean().backward()
    names = diffusers_names(spec)
    gradients = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        ours_gradient = gradients[str(names.to_ours(key))].grad
        if parameter.grad is not None and parameter.grad.norm() > 1e-7:
            assert ours_gradient is not None
            assert relative_error(ours_gradient, parameter.grad) < 1e-4, key


@pytest.mark.slow
def test_every_key_of_the_full_size_has_its_place_in_both_formats() -> None:
    with torch.device("meta"):
        theirs = reference(SD1_AUTOENCODER).state_dict()
    ours = LatentDiffusionAutoencoder(device="meta").state_dict()
    names, original = diffusers_names(SD1_AUTOENCODER), single_file_names(SD1_AUTOENCODER)
    assert {names.to_theirs(key) for key in ours} == set(theirs)
    for key, tensor in ours.items():
        assert theirs[str(names.to_theirs(key))].shape == tensor.shape
        assert names.to_ours(str(names.to_theirs(key))) == key
        assert original.to_ours(str(original.to_theirs(key))) == key
    assert len({original.to_theirs(key) for key in ours}) == len(ours)
    lowest = "Decoder.DecoderLevel_1.ResidualBlock_1.Chain.Conv2d_1.weight"
    assert original.to_theirs(lowest) == "decoder.up.3.block.0.conv1.weight"


def test_images_go_in_and_come_out() -> None:
    autoencoder = LatentDiffusionAutoencoder(SPECS["two levels"])
    image = Image.new("RGB", (12, 8), (255, 0, 128))
    with torch.no_grad():
        latents = autoencoder.encode_image(image)
        assert latents.shape == (1, 4, 4, 6)
        assert autoencoder.decode_latents(latents).size == (12, 8)
        assert len(autoencoder.latents_to_images(torch.cat([latents, latents]))) == 2
    with pytest.raises(ValueError, match="takes the latents of one picture, not 2"):
        autoencoder.decode_latents(torch.cat([latents, latents]))
    with pytest.raises(ValueError, match=r"11x8 .* multiples of 2"):
        autoencoder.encode_image(Image.new("RGB", (11, 8)))


def test_names_of_the_last_refiners_do_the_same() -> None:
    ours, _ = pair(SPECS["two levels"])
    image, latents = Image.new("RGB", (16, 8), "teal"), torch.randn(1, 4, 4, 8)
    with torch.no_grad():
        assert torch.equal(ours.image_to_latents(image), ours.encode_image(image))
        assert ours.latents_to_image(latents).tobytes() == ours.decode_latents(latents).tobytes()


def test_several_images_are_encoded_as_each_alone() -> None:
    ours, _ = pair(SPECS["two levels"])
    images = [Image.new("RGB", (16, 8), "teal"), Image.new("L", (16, 8), 200)]
    with torch.no_grad():
        together = ours.images_to_latents(images)
        torch.testing.assert_close(together, torch.cat([ours.encode_image(image) for image in images]))
    assert not torch.allclose(together[0], together[1])
    with pytest.raises(ValueError, match="given no pictures"):
        ours.images_to_latents([])
    with pytest.raises(ValueError, match="resize or convert them to one size"):
        ours.images_to_latents([images[0], Image.new("RGB", (8, 8))])
