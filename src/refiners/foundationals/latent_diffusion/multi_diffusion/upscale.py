"""Pictures enlarged with detail of the model's own: it goes on from the enlarged picture, in overlapping windows."""

from math import inf
from typing import Any

from PIL import Image

from refiners.fluxion.checks import picture
from refiners.foundationals.latent_diffusion.generation import TextToImage
from refiners.foundationals.latent_diffusion.multi_diffusion.multi_diffusion import MultiDiffusion


def upscale(
    model: TextToImage,
    image: Image.Image,
    factor: float = 2.0,
    prompt: str = "",
    negative_prompt: str = "",
    strength: float = 0.35,
    window_size: int | None = None,
    stride: int | None = None,
    **options: Any,
) -> Image.Image:
    """Enlarge a picture, in memory that depends on the windows and not on the picture.

    factor: of both sides, which are rounded down to whole latents.
    prompt: of the picture as a whole; each window is led by it, so that words for style and quality serve best.
    strength: how much is made anew, in (0, 1]: the more, the more detail, and the less is it the same picture.
    window_size, stride: of the windows, and from one to the next, in pixels, see `MultiDiffusion`.
    options: others of `generate`, such as seed and num_inference_steps.
    Raises ValueError if the picture would become smaller, TypeError if it is none, and as `MultiDiffusion`.
    """
    if not 1 <= factor < inf:
        raise ValueError(f"factor is {factor}, but enlarging takes a finite number of 1 or more")
    windows = MultiDiffusion(model, window_size, stride, is_faded=True)
    unit = model.lda.spec.downsampling_factor
    width, height = (max(int(side * factor) // unit, 1) * unit for side in picture(image).size)
    enlarged = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    windows.inject()
    try:
        options.setdefault("tile_size", windows.window_size)
        (made,) = model.generate(prompt, negative_prompt, init_image=enlarged, strength=strength, **options)
    finally:
        windows.eject()
    return made
