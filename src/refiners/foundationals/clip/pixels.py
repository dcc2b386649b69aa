"""Pictures as CLIP sees them: squares of one size, with channels of mean 0 and variance 1 over its training data."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from refiners.fluxion.checks import list_of_pictures
from refiners.fluxion.layers.module import Module, single_output
from refiners.fluxion.utils import images_to_tensor, normalize

MEAN = (0.48145466, 0.4578275, 0.40821073)
STANDARD_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@single_output
class Pixels(Module):
    """A picture or several, of any sizes, to (B, 3, size, size), normalised; such a tensor stays as it is.

    The short side is resized to `size` (bicubic), and the middle of the long one is kept. Pictures of any mode are
    turned into RGB, which forgets transparency.
    Raises ValueError for a tensor of another shape, or no pictures, TypeError for what is no picture.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, pictures: Tensor | Image.Image | Sequence[Image.Image]) -> Tensor:
        if isinstance(pictures, Tensor):
            return self._checked(pictures)
        pixels = images_to_tensor([self._square(image.convert("RGB")) for image in list_of_pictures(pictures)])
        return normalize(pixels, MEAN, STANDARD_DEVIATION)

    def _checked(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, self.size, self.size):
            raise ValueError(
                f"this image encoder takes pixels of (B, 3, {self.size}, {self.size}), but these are "
                f"{tuple(pixels.shape)}: give it the picture itself, or resize them"
            )
        return pixels

    def _square(self, image: Image.Image) -> Image.Image:
        size, short = self.size, min(image.size)
        width, height = (int(size * side / short) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + size, top + size))

    def extra_repr(self) -> str:
        return str(self.size)
