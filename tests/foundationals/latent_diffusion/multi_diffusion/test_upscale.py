"""The upscaler: what it is made of gives the same, and the picture stays the picture."""

import pytest
from PIL import Image

from refiners.fluxion.utils import image_to_tensor
from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.multi_diffusion import MultiDiffusion, upscale


def test_it_is_an_enlarged_picture_done_over_in_windows_and_the_model_is_as_before() -> None:
    model = StableDiffusion_1.from_pretrained("builtin")
    (picture,) = model.generate("a red circle", show_progress=False, num_inference_steps=8)
    enlarged = upscale(model, picture, 2, "a red circle", strength=0.3, num_inference_steps=8, show_progress=False)
    assert enlarged.size == (64, 64) and model.unet_runner is None
    plain = picture.resize((64, 64), Image.Resampling.LANCZOS)
    MultiDiffusion(model, is_faded=True).inject()
    (expected,) = model.generate(
        "a red circle", init_image=plain, strength=0.3, tile_size=32, num_inference_steps=8, show_progress=False
    )
    assert enlarged.tobytes() == expected.tobytes()
    assert (image_to_tensor(enlarged) - image_to_tensor(plain)).abs().mean() < 0.1


def test_it_rounds_to_whole_latents_and_a_failure_leaves_the_model_as_it_was() -> None:
    model = StableDiffusion_1.from_pretrained("builtin")
    picture = Image.new("L", (30, 21), 200)
    options = {"num_inference_steps": 2, "show_progress": False}
    assert upscale(model, picture, 1.5, strength=1.0, **options).size == (44, 28)
    with pytest.raises(ValueError, match=r"factor is 0\.5"):
        upscale(model, picture, 0.5)
    with pytest.raises(ValueError, match="factor is inf"):
        upscale(model, picture, float("inf"))
    with pytest.raises(ValueError, match="strength is 2"):
        upscale(model, picture, strength=2)
    assert model.unet_runner is None
