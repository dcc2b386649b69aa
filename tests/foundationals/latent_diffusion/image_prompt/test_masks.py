"""Masks of image prompts."""

import numpy as np
import pytest
import torch
from diffusion_specimens import small_model
from ip_adapter_specimens import features
from PIL import Image

from refiners.foundationals.latent_diffusion.image_prompt import ImageProjection, IPAdapter
from refiners.foundationals.latent_diffusion.image_prompt.masks import masks_to_tensor
from refiners.foundationals.latent_diffusion.multi_diffusion import MultiDiffusion, Region


def grey(values: list[list[int]], mode: str = "L") -> Image.Image:
    height, width = len(values), len(values[0])
    image = Image.new("L", (width, height))
    image.putdata([value for row in values for value in row])
    return image.convert(mode)


def test_masks_of_16_bits_are_white_from_the_middle_of_those() -> None:
    mask = Image.fromarray(np.array([[0, 300, 32000, 33000, 65535]], dtype=np.uint16))
    assert masks_to_tensor(mask).flatten().tolist() == [0, 0, 0, 1, 1]
    (shares,) = Region("a", mask).weights(1, 5)
    assert torch.allclose(shares, torch.tensor([0, 300, 32000, 33000, 65535]) / 65535, atol=1 / 255)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_masks_of_any_mode_are_one_where_they_are_white(mode: str) -> None:
    masks = [grey([[0, 255], [255, 0]], mode), grey([[255, 255], [0, 0]], mode)]
    assert masks_to_tensor(masks)[0].tolist() == [[[0, 1], [1, 0]], [[1, 1], [0, 0]]]


def test_half_counts_as_white_and_scales_multiply() -> None:
    masks = [grey([[127, 128]]), grey([[255, 0]])]
    assert masks_to_tensor(masks, scales=[0.5, 2.0]).flatten().tolist() == [0, 0.5, 2, 0]


def test_a_lone_mask_needs_no_list() -> None:
    mask = grey([[0, 255], [255, 0]])
    assert torch.equal(masks_to_tensor(mask), masks_to_tensor([mask]))


def test_masks_that_do_not_fit_are_refused() -> None:
    model = small_model()
    adapter = IPAdapter(model, image_proj=ImageProjection(20, 32)).inject()
    adapter.set_clip_image_embedding(adapter.embed_features(features("plain", pictures=2)))
    with pytest.raises(ValueError, match="picture 1 gives shape"):
        adapter.set_masks([grey([[0, 1]]), grey([[0], [1]])])
    with pytest.raises(ValueError, match="the mask should be a picture, or several, but there are none"):
        adapter.set_masks([])
    with pytest.raises(ValueError, match="the scales of masks should be 2 numbers, one for each, but there are 1"):
        adapter.set_masks([grey([[0, 1]])] * 2, scales=[1.0])
    with pytest.raises(ValueError, match="scales of masks, number 1 of 2, should be a finite number, but it is nan"):
        adapter.set_masks([grey([[0, 1]])] * 2, scales=[1.0, float("nan")])
    with pytest.raises(ValueError, match="the weights of pictures, number 0 of 2, should be a finite number"):
        adapter.embed_features(features("plain", pictures=2), weights=[float("inf"), 1.0])
    adapter.set_masks([grey([[0, 1]])] * 3)
    with pytest.raises(ValueError, match="3 masks, but the 8 tokens of the image prompt"):
        model.predict_noise(torch.zeros(1, 4, 8, 8), 0, torch.zeros(2, 77, 32))


def test_masks_are_cut_out_along_with_the_windows_of_a_large_picture() -> None:
    model = small_model()
    adapter = IPAdapter(model, image_proj=ImageProjection(20, 32)).inject()
    adapter.set_clip_image_embedding(adapter.embed_features(features("plain")).detach())
    x, text = torch.randn(1, 4, 8, 24), torch.randn(2, 77, 32)
    left = Image.new("L", (192, 64), 0)
    left.paste(255, (0, 0, 96, 64))
    adapter.set_masks([left])
    windows = MultiDiffusion(model, window_size=64, stride=64, window_batch_size=2).inject()
    with torch.no_grad():
        output = model.predict_noise(x, 0, text)
        windows.eject()
        for start, columns in ((0, slice(0, 64)), (8, slice(64, 128)), (16, slice(128, 192))):
            adapter.set_masks([left.crop((columns.start, 0, columns.stop, 64))])
            alone = model.predict_noise(x[..., start : start + 8], 0, text)
            assert torch.allclose(output[..., start : start + 8], alone, atol=1e-5)
