"""Informative Drawings (arXiv 2203.12691): line drawings of pictures, by the generator of CycleGAN (arXiv 1703.10593).

Pictures (B, 3, H, W) in [0, 1] to drawings (B, 1, H, W), 1 where the paper is, 0 where a line is.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.fluxion.checks import picture
from refiners.fluxion.context import placed
from refiners.fluxion.utils import image_to_tensor, pad, tensor_to_image
from refiners.weights.matching import match_all
from refiners.weights.rules import Names
from refiners.weights.tensors import read_tensors


@dataclass(frozen=True)
class DrawingSpec:
    """The sizes of a generator of drawings.

    channels: width at full resolution, half and a quarter.
    """

    channels: tuple[int, int, int] = (64, 128, 256)
    residual_blocks: int = 3
    in_channels: int = 3
    out_channels: int = 1


DRAWING = DrawingSpec()


class InformativeDrawings(fl.Chain):
    """Line drawings of pictures whose sides are multiples of 4."""

    def __init__(
        self,
        spec: DrawingSpec = DRAWING,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.spec = spec
        full, half, quarter = spec.channels
        with placed(device, dtype):
            super().__init__(
                fl.ReflectionPad2d(3),
                fl.Conv2d(spec.in_channels, full, kernel_size=7),
                fl.InstanceNorm2d(full),
                fl.ReLU(),
                Halving(full, half),
                Halving(half, quarter),
                *(ResidualBlock(quarter) for _ in range(spec.residual_blocks)),
                Doubling(quarter, half),
                Doubling(half, full),
                fl.ReflectionPad2d(3),
                fl.Conv2d(full, spec.out_channels, kernel_size=7),
                fl.Sigmoid(),
            )

    @torch.no_grad()
    def draw(self, image: Image.Image) -> Image.Image:
        """The drawing of a picture of any size: dark lines on white, of mode L.

        ControlNets and T2I-Adapters for line art were trained with the opposite: `PIL.ImageOps.invert` gives it.
        """
        pixels = image_to_tensor(picture(image).convert("RGB"), device=self.device, dtype=self.dtype)
        x = pad(pixels, (0, -image.width % 4, 0, -image.height % 4), mode="replicate")
        return tensor_to_image(self(x)[..., : image.height, : image.width])


class Halving(fl.Chain):
    """A convolution to half the height and width."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            fl.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1),
            fl.InstanceNorm2d(out_channels),
            fl.ReLU(),
        )


class Doubling(fl.Chain):
    """A transposed convolution to twice the height and width."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            fl.ConvTranspose2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1, output_padding=1),
            fl.InstanceNorm2d(out_channels),
            fl.ReLU(),
        )


class ResidualBlock(fl.Residual):
    """Two convolutions and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            fl.ReflectionPad2d(1),
            fl.Conv2d(channels, channels, kernel_size=3),
            fl.InstanceNorm2d(channels),
            fl.ReLU(),
            fl.ReflectionPad2d(1),
            fl.Conv2d(channels, channels, kernel_size=3),
            fl.InstanceNorm2d(channels),
        )


# What the parameters are called in the authors' files.
AUTHORS_NAMES = Names(
    {
        "Conv2d_1": "model0.1",
        "Halving_1.Conv2d": "model1.0",
        "Halving_2.Conv2d": "model1.3",
        "ResidualBlock_{n}": (
            "model2.{n-1}.conv_block",
            Names({"Conv2d_1": "1", "Conv2d_2": "5"}),
        ),
        "Doubling_1.ConvTranspose2d": "model3.0",
        "Doubling_2.ConvTranspose2d": "model3.3",
        "Conv2d_2": "model4.1",
    }
)


def load_informative_drawings(
    path: Path | str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> InformativeDrawings:
    """The generator with the weights of a file of the authors, such as their anime_style or contour_style.

    Raises ValueError, which names them, for tensors that do not fit, FileNotFoundError.
    """
    tensors = read_tensors(path)
    generator = InformativeDrawings(device="meta")
    shapes = {name: tensor.shape for name, tensor in generator.state_dict().items()}
    dtype = dtype or torch.get_default_dtype()
    matched: dict[str, Tensor] = match_all(tensors, AUTHORS_NAMES, shapes, str(path))
    generator.load_state_dict(
        {name: tensor.to(device=device or "cpu", dtype=dtype) for name, tensor in matched.items()}, assign=True
    )
    return generator
