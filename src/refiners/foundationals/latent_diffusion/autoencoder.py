"""The autoencoder of latent diffusion: pictures to latents and back (arXiv 2112.10752, section 3.1).

Pictures (B, 3, H, W) in [-1, 1] to latents (B, latent_channels, H / f, W / f), f = 2^(levels - 1), and back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.fluxion.checks import picture
from refiners.fluxion.context import placed
from refiners.fluxion.utils import images_to_tensor, tensor_to_images
from refiners.foundationals.latent_diffusion.tiles import run_in_tiles


@dataclass(frozen=True)
class AutoencoderSpec:
    """The sizes of an autoencoder.

    channels: width of each level, from full to lowest resolution; each level but the last ends with a halving.
    latent_scale: what latents are multiplied with, so that their variance is about 1.
    needs_float32: whether its activations leave the range of float16.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks_per_level: int = 2
    latent_channels: int = 4
    norm_groups: int = 32
    latent_scale: float = 0.18215
    needs_float32: bool = False

    @property
    def downsampling_factor(self) -> int:
        """How many pixels of a picture's side make one of the latents'."""
        return 2 ** (len(self.channels) - 1)

    def dtype_for(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """The number format to run in where the rest of a model has `dtype`."""
        return torch.float32 if self.needs_float32 and dtype is torch.float16 else dtype


SD1_AUTOENCODER = AutoencoderSpec()
SDXL_AUTOENCODER = AutoencoderSpec(latent_scale=0.13025, needs_float32=True)


class ResidualBlock(fl.Sum):
    """Two convolutions and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, spec: AutoencoderSpec) -> None:
        super().__init__(
            fl.Chain(
                fl.GroupNorm(in_channels, spec.norm_groups, eps=1e-6),
                fl.SiLU(),
                fl.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
                fl.GroupNorm(out_channels, spec.norm_groups, eps=1e-6),
                fl.SiLU(),
                fl.Conv2d(out_channels, out_channels, kernel_size=3, padding=1),
            ),
            fl.Identity() if in_channels == out_channels else fl.Conv2d(in_channels, out_channels, kernel_size=1),
        )


class MiddleBlock(fl.Chain):
    """The lowest resolution: two residual blocks around attention of all positions over one another."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        width = spec.channels[-1]
        super().__init__(
            ResidualBlock(width, width, spec),
            fl.Residual(fl.GroupNorm(width, spec.norm_groups, eps=1e-6), fl.SelfAttention2d(width)),
            ResidualBlock(width, width, spec),
        )


class Encoder(fl.Chain):
    """Pictures to the mean and log variance of their latents, one after the other along the channels."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        width, moments = spec.channels[-1], 2 * spec.latent_channels
        super().__init__(
            fl.Conv2d(3, spec.channels[0], kernel_size=3, padding=1),
            *(EncoderLevel(level, spec) for level in range(len(spec.channels))),
            MiddleBlock(spec),
            fl.GroupNorm(width, spec.norm_groups, eps=1e-6),
            fl.SiLU(),
            fl.Conv2d(width, moments, kernel_size=3, padding=1),
            fl.Conv2d(moments, moments, kernel_size=1),
        )


class EncoderLevel(fl.Chain):
    """Residual blocks of one resolution, then a halving (but for the last level)."""

    def __init__(self, level: int, spec: AutoencoderSpec) -> None:
        width, is_last = spec.channels[level], level == len(spec.channels) - 1
        widths = [spec.channels[max(level - 1, 0)], *[width] * spec.blocks_per_level]
        super().__init__(
            *(ResidualBlock(before, width, spec) for before in widths[:-1]),
            *([] if is_last else [fl.Downsample(width, scale_factor=2, register_shape=False)]),
        )


class Decoder(fl.Chain):
    """Latents to pictures."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        width = spec.channels[0]
        super().__init__(
            fl.Conv2d(spec.latent_channels, spec.latent_channels, kernel_size=1),
            fl.Conv2d(spec.latent_channels, spec.channels[-1], kernel_size=3, padding=1),
            MiddleBlock(spec),
            *(DecoderLevel(level, spec) for level in reversed(range(len(spec.channels)))),
            fl.GroupNorm(width, spec.norm_groups, eps=1e-6),
            fl.SiLU(),
            fl.Conv2d(width, 3, kernel_size=3, padding=1),
        )


class DecoderLevel(fl.Chain):
    """Residual blocks of one resolution, one more than on the way down, then a doubling (but for the last level)."""

    def __init__(self, level: int, spec: AutoencoderSpec) -> None:
        width, below = spec.channels[level], min(level + 1, len(spec.channels) - 1)
        widths = [spec.channels[below], *[width] * (spec.blocks_per_level + 1)]
        super().__init__(
            *(ResidualBlock(before, width, spec) for before in widths[:-1]),
            *([fl.Upsample(width, upsample_factor=2)] if level > 0 else []),
        )


class LatentDiffusionAutoencoder(fl.Chain):
    """Encoder and decoder; called as a whole it gives the pictures back as it sees them."""

    def __init__(
        self,
        spec: AutoencoderSpec = SD1_AUTOENCODER,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.spec = spec
        with placed(device, dtype):
            super().__init__(
                Encoder(spec),
                fl.Slicing(dim=1, end=spec.latent_channels),
                Decoder(spec),
            )

    def encode(
        self,
        x: Float[Tensor, "b 3 height width"],
        noise: Float[Tensor, "b c h w"] | None = None,
        tile_size: int | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Pictures in [-1, 1] to latents of about unit variance: their mean, or with unit `noise` a sample.

        tile_size: side in pixels of overlapping tiles, to save memory; None for pictures whole. See `run_in_tiles`.
        Raises ValueError if height or width is not a multiple of the downsampling factor.
        """
        factor = self.spec.downsampling_factor
        if x.shape[-2] % factor or x.shape[-1] % factor:
            height, width = x.shape[-2:]
            raise ValueError(f"a picture of {width}x{height} cannot be encoded: sides must be multiples of {factor}")
        x = x.to(self.dtype)
        moments = self.Encoder(x) if tile_size is None else run_in_tiles(self.Encoder, x, tile_size, 1, factor)
        mean, log_variance = moments.chunk(2, dim=1)
        latents = mean if noise is None else mean + noise * torch.exp(0.5 * log_variance.clamp(-30, 20))
        return latents * self.spec.latent_scale

    def decode(
        self, latents: Float[Tensor, "b c h w"], tile_size: int | None = None
    ) -> Float[Tensor, "b 3 height width"]:
        """Latents to pictures in about [-1, 1].

        tile_size: side in pixels of overlapping tiles, to save memory; None for pictures whole. See `run_in_tiles`.
        """
        latents = latents.to(self.dtype) / self.spec.latent_scale
        if tile_size is None:
            return self.Decoder(latents)
        return run_in_tiles(self.Decoder, latents, tile_size, self.spec.downsampling_factor, 1)

    def encode_image(self, image: Image.Image, tile_size: int | None = None) -> Float[Tensor, "1 c h w"]:
        """A PIL image to latents; `tile_size` as for `encode`."""
        return self.images_to_latents([image], tile_size)

    def images_to_latents(
        self, images: Sequence[Image.Image], tile_size: int | None = None
    ) -> Float[Tensor, "b c h w"]:
        """PIL images of one size to latents; `tile_size` as for `encode`. Raises ValueError if there are none."""
        colours = [picture(image).convert("RGB") for image in images]
        pixels = images_to_tensor(colours, device=self.device, dtype=self.dtype)
        return self.encode(pixels * 2 - 1, tile_size=tile_size)

    def decode_latents(self, x: Float[Tensor, "b c h w"]) -> Image.Image:
        """Latents of one picture to a PIL image. Raises ValueError for a batch of several: see `latents_to_images`."""
        if x.shape[0] != 1:
            raise ValueError(
                f"decode_latents takes the latents of one picture, not {x.shape[0]}: use latents_to_images"
            )
        return self.latents_to_images(x)[0]

    def latents_to_images(self, x: Float[Tensor, "b c h w"], tile_size: int | None = None) -> list[Image.Image]:
        """Latents to PIL images; `tile_size` as for `decode`."""
        return tensor_to_images((self.decode(x, tile_size) + 1) / 2)

    image_to_latents = encode_image  # as in later versions of the first refiners, and so is the next
    latents_to_image = decode_latents
