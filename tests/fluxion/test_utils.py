"""The seed's tools: pictures survive the trip through tensors exactly, and filters equal their references."""

import inspect
import random
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional

from refiners.fluxion import utils

P = ParamSpec("P")
R = TypeVar("R")

MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}


def unchecked(function: Callable[P, R]) -> Callable[P, R]:
    """The function as a user has it, without the type checks that a test run may put around it."""
    return inspect.unwrap(function)


def random_image(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    size = width * height * MODES[mode]
    return Image.frombytes(mode, (width, height), np.random.default_rng(seed).bytes(size))


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# --- seeds and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 42, 2**32 + 5, -1, 2**63])
def test_manual_seed_repeats_torch_numpy_and_python(seed: int) -> None:
    draws: list[tuple[list[float], list[float], float]] = []
    for _ in range(2):
        utils.manual_seed(seed)
        draws.append((torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()))
    assert draws[0] == draws[1]
    utils.manual_seed(seed + 1)
    assert torch.rand(3).tolist() != draws[0][0]
    assert np.random.rand(3).tolist() != draws[0][1]
    assert random.random() != draws[0][2]


def test_no_grad_works_as_context_and_as_decorator() -> None:
    x = torch.ones(1, requires_grad=True)

    @utils.no_grad()
    def called(x: Tensor) -> Tensor:
        return x * 2

    @utils.no_grad
    def bare(x: Tensor) -> Tensor:
        return x * 2

    with utils.no_grad():
        inside = x * 2
    assert not inside.requires_grad and not called(x).requires_grad and not bare(x).requires_grad
    assert (x * 2).requires_grad


def test_no_grad_compiles_in_one_graph() -> None:
    def double(x: Tensor) -> Tensor:
        with utils.no_grad():
            return x * 2

    x = torch.ones(2, requires_grad=True)
    compiled = torch.compile(double, backend="eager", fullgraph=True)
    assert not compiled(x).requires_grad


# --- files ------------------------------------------------------------------------------------------------------------


def test_safetensors_round_trip_keeps_tensors_and_metadata(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    utils.save_to_safetensors(tmp_path / "x.safetensors", tensors, {"author": "me"})
    read = utils.load_from_safetensors(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert utils.load_metadata_from_safetensors(tmp_path / "x.safetensors") == {"author": "me"}


def test_metadata_of_a_file_without_any_is_none(tmp_path: Path) -> None:
    utils.save_to_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    assert utils.load_metadata_from_safetensors(tmp_path / "x.safetensors") is None


def test_load_tensors_reads_a_torch_file(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "x.ckpt")
    assert torch.equal(utils.load_tensors(tmp_path / "x.ckpt")["a"], torch.ones(2))


# --- pictures ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(mode=st.sampled_from(list(MODES)), width=st.integers(0, 9), height=st.integers(0, 9), seed=st.integers(0, 99))
def test_picture_comes_back_from_its_tensor_exactly(mode: str, width: int, height: int, seed: int) -> None:
    image = random_image(mode, width, height, seed)
    tensor = utils.image_to_tensor(image)
    assert tensor.shape == (1, MODES[mode], height, width) and tensor.dtype == torch.float32
    back = utils.tensor_to_image(tensor)
    assert (back.mode, back.size, back.tobytes()) == (mode, image.size, image.tobytes())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_all_256_values_come_back_exactly(dtype: torch.dtype) -> None:
    image = Image.frombytes("L", (256, 1), bytes(range(256)))
    tensor = utils.image_to_tensor(image, device="cpu", dtype=dtype)
    assert tensor.dtype == dtype and tensor.min() == 0 and tensor.max() == 1
    assert utils.tensor_to_image(tensor).tobytes() == image.tobytes()


def test_channels_rows_and_columns_are_in_order() -> None:
    image = Image.new("RGB", (3, 2))
    image.putpixel((2, 1), (255, 51, 0))
    tensor = utils.image_to_tensor(image)
    assert tensor.is_contiguous()
    assert torch.equal(tensor[0, :, 1, 2], torch.tensor([255, 51, 0]) / 255)
    assert tensor.count_nonzero() == 2


def test_values_are_clamped_and_rounded_to_the_nearest() -> None:
    tensor = torch.tensor([-3.0, 0.49 / 255, 0.51 / 255, 254.4 / 255, 254.6 / 255, 7.0]).reshape(1, 1, 1, 6)
    assert list(utils.tensor_to_image(tensor).tobytes()) == [0, 0, 1, 254, 255, 255]


def test_tensor_with_gradient_becomes_a_picture_and_is_not_changed() -> None:
    tensor = random_tensor(1, 3, 2, 2).mul_(2).requires_grad_()
    before = tensor.detach().clone()
    utils.tensor_to_image(tensor)
    assert torch.equal(tensor, before)


def test_palettes_and_black_and_white_are_read_as_they_look() -> None:
    grey = random_image("RGB", 6, 5)
    palette = grey.quantize(4)
    assert torch.equal(utils.image_to_tensor(palette), utils.image_to_tensor(palette.convert("RGB")))
    palette.info["transparency"] = 0
    assert torch.equal(utils.image_to_tensor(palette), utils.image_to_tensor(palette.convert("RGBA")))
    black_and_white = grey.convert("1")
    assert set(utils.image_to_tensor(black_and_white).unique().tolist()) <= {0.0, 1.0}
    assert utils.image_to_tensor(black_and_white).shape == (1, 1, 5, 6)


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "CMYK", "YCbCr", "LAB", "HSV"])
def test_other_modes_are_refused_with_the_modes_that_work(mode: str) -> None:
    with pytest.raises(ValueError, match=f"mode '{mode}', only L, LA, RGB, RGBA, 1, P and PA; convert it"):
        utils.image_to_tensor(Image.new(mode, (2, 2)))


def test_pictures_become_a_batch_and_come_back() -> None:
    images = [random_image("RGB", 4, 3, seed) for seed in range(3)]
    batch = utils.images_to_tensor(images, dtype=torch.float16)
    assert batch.shape == (3, 3, 3, 4) and batch.dtype == torch.float16
    assert [image.tobytes() for image in utils.tensor_to_images(batch)] == [image.tobytes() for image in images]
    assert utils.tensor_to_images(torch.zeros(0, 3, 2, 2)) == []


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ([], "no pictures"),
        ([Image.new("RGB", (2, 3)), Image.new("RGB", (3, 3))], r"picture 1 gives shape \(1, 3, 3, 3\).*\(1, 3, 3, 2\)"),
        ([Image.new("RGB", (2, 3)), Image.new("L", (2, 3))], "picture 1"),
    ],
    ids=["none", "size", "mode"],
)
def test_pictures_that_make_no_batch_are_refused(images: list[Image.Image], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        utils.images_to_tensor(images)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(2, 3, 4, 4), r"\(2, 3, 4, 4\); use tensor_to_images"),
        (torch.zeros(3, 4, 4), r"\(3, 4, 4\)"),
        (torch.zeros(1, 5, 4, 4), r"c from 1 to 4.*\(1, 5, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "torch.uint8; divide by 255"),
        (torch.full((1, 1, 2, 2), float("nan")), "4 of 4 values are NaN or infinite"),
        (torch.tensor([0.0, float("inf")]).reshape(1, 1, 1, 2), "1 of 2 values"),
    ],
    ids=["batch", "no batch", "channels", "integers", "nan", "infinite"],
)
def test_tensor_that_is_no_picture_is_refused(tensor: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        unchecked(utils.tensor_to_image)(tensor)


def test_shapes_and_dtypes_of_pictures_are_checked() -> None:
    with pytest.raises(ValueError, match=r"torch\.uint8; use a floating point"):
        utils.image_to_tensor(Image.new("L", (2, 2)), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"\(3, 2, 2\)"):
        unchecked(utils.tensor_to_images)(torch.zeros(3, 2, 2))


# --- filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "area", "nearest-exact"])
def test_interpolate_equals_torch(mode: str) -> None:
    x = random_tensor(2, 3, 8, 10)
    expected = functional.interpolate(x, size=(5, 7), mode=mode)
    assert torch.equal(utils.interpolate(x, torch.Size((5, 7)), mode), expected)
    assert torch.equal(utils.interpolate(x, (5, 7), mode=mode), expected)
    halved = functional.interpolate(x, scale_factor=0.5, mode=mode)
    assert torch.equal(utils.interpolate(x, factor=0.5, mode=mode), halved)


def test_interpolate_antialias_equals_torch_and_default_is_nearest() -> None:
    x = random_tensor(1, 3, 8, 8)
    smooth = functional.interpolate(x, size=(3, 3), mode="bilinear", antialias=True)
    assert torch.equal(utils.interpolate(x, (3, 3), "bilinear", antialias=True), smooth)
    assert torch.equal(utils.interpolate(x, (16, 16)), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_interpolate_needs_exactly_one_of_size_and_factor() -> None:
    with pytest.raises(ValueError, match="size=None and factor=None"):
        utils.interpolate(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"size=4 and factor=2\.0"):
        utils.interpolate(torch.zeros(1, 1, 2, 2), 4, factor=2.0)


def dense_blur(image: np.ndarray, size: tuple[int, int], sigma: tuple[float, float]) -> np.ndarray:
    """One dense two-dimensional convolution in float64, straight from the definition; mirrored without the edge."""
    (size_x, size_y), (sigma_x, sigma_y) = size, sigma
    dx, dy = np.arange(size_x) - size_x // 2, np.arange(size_y) - size_y // 2
    kernel = np.exp(-(dx[None, :] ** 2) / (2 * sigma_x**2) - dy[:, None] ** 2 / (2 * sigma_y**2))
    kernel /= kernel.sum()
    padded = np.pad(image, ((size_y // 2,) * 2, (size_x // 2,) * 2), mode="reflect")
    blurred = np.zeros_like(image)
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            blurred[row, column] = (padded[row : row + size_y, column : column + size_x] * kernel).sum()
    return blurred


def default_sigma(size: int) -> float:
    return 0.3 * ((size - 1) * 0.5 - 1) + 0.8


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.sampled_from([1, 3, 5, 9]), st.sampled_from([1, 3, 7])),
    sigma=st.none() | st.floats(0.2, 4) | st.tuples(st.floats(0.2, 4), st.floats(0.2, 4)),
    batch=st.sampled_from([(), (2,), (1, 3), (2, 1, 2)]),
)
def test_gaussian_blur_equals_a_dense_convolution(
    size: tuple[int, int], sigma: float | tuple[float, float] | None, batch: tuple[int, ...]
) -> None:
    x = random_tensor(*batch, 8, 6).double()
    if sigma is None:
        sigmas = (default_sigma(size[0]), default_sigma(size[1]))
    else:
        sigmas = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    blurred = utils.gaussian_blur(x, size, sigma)
    assert blurred.shape == x.shape
    for ours, image in zip(blurred.reshape(-1, 8, 6), x.reshape(-1, 8, 6), strict=True):
        np.testing.assert_allclose(ours.numpy(), dense_blur(image.numpy(), size, sigmas), rtol=1e-10, atol=1e-12)


def test_gaussian_blur_takes_one_number_for_both_axes_and_keeps_constants() -> None:
    x = random_tensor(1, 3, 8, 8)
    assert torch.equal(utils.gaussian_blur(x, 5, 1.5), utils.gaussian_blur(x, (5, 5), (1.5, 1.5)))
    assert torch.allclose(utils.gaussian_blur(torch.full((2, 9, 9), 0.7), 7), torch.tensor(0.7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gaussian_blur_keeps_dtype_and_gradient(dtype: torch.dtype) -> None:
    x = random_tensor(1, 3, 8, 8, dtype=dtype).requires_grad_()
    blurred = utils.gaussian_blur(x, 3)
    blurred.sum().backward()
    assert blurred.dtype == dtype and x.grad is not None
    assert torch.allclose(blurred.float(), utils.gaussian_blur(x.detach().float(), 3), atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((4,), "odd and positive, but it is 4; try 5"),
        ((0,), "it is 0; try 1"),
        (((3, -3),), "it is -3; try 1"),
        (((3, 3, 3),), r"kernel_size should be one number or \(x, y\)"),
        ((3, 0.0), "sigma should be positive, but it is 0.0"),
        ((3, (1.0, float("nan"))), "it is nan"),
        ((17,), "17 is too large for width 8"),
    ],
)
def test_gaussian_blur_refuses_what_it_cannot_do(arguments: tuple[object, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        utils.gaussian_blur(torch.zeros(1, 8, 8), *arguments)


def test_filters_refuse_integers_and_too_few_dimensions() -> None:
    with pytest.raises(ValueError, match=r"torch.uint8 of shape \(4, 4\)"):
        unchecked(utils.gaussian_blur)(torch.zeros(4, 4, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        unchecked(utils.gaussian_blur)(torch.zeros(4), 3)
    with pytest.raises(ValueError, match=r"torch.int64 of shape"):
        unchecked(utils.normalize)(torch.zeros(1, 4, 4, dtype=torch.int64), [0.5], [0.5])
    with pytest.raises(ValueError, match=r"shape \(4, 4\)"):
        unchecked(utils.normalize)(torch.zeros(4, 4), [0.5], [0.5])


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_pad_equals_torch(mode: str) -> None:
    x = random_tensor(1, 2, 4, 5)
    assert torch.equal(utils.pad(x, (1, 2, 3, 0), mode=mode), functional.pad(x, [1, 2, 3, 0], mode=mode))


def test_pad_fills_with_the_value() -> None:
    padded = utils.pad(torch.zeros(1, 1, 2, 2), iter([1, 0]), value=3.0)
    assert padded.tolist() == [[[[3.0, 0.0, 0.0], [3.0, 0.0, 0.0]]]]
    with pytest.raises(ValueError, match=r"'reflect' takes no value, but got 3\.0"):
        utils.pad(torch.zeros(1, 1, 2, 2), (1, 1, 1, 1), value=3.0, mode="reflect")


@settings(max_examples=40, deadline=None)
@given(batch=st.sampled_from([(), (2,), (2, 1)]), channels=st.integers(1, 4), single=st.booleans(), data=st.data())
def test_normalize_is_mean_and_deviation_of_each_channel(
    batch: tuple[int, ...], channels: int, single: bool, data: st.DataObject
) -> None:
    count = 1 if single else channels
    mean = data.draw(st.lists(st.floats(-2, 2), min_size=count, max_size=count))
    std = data.draw(st.lists(st.floats(0.1, 3), min_size=count, max_size=count))
    x = random_tensor(*batch, channels, 3, 2).double()
    result = utils.normalize(x, mean, std)
    assert result.shape == x.shape
    for channel in range(channels):
        index = 0 if single else channel
        expected = (x[..., channel, :, :] - mean[index]) / std[index]
        assert torch.equal(result[..., channel, :, :], expected)


@pytest.mark.parametrize(
    ("mean", "std", "reason"),
    [
        ([0.5] * 2, [0.5] * 3, "mean has 2 numbers, but the tensor has 3 channels"),
        ([0.5] * 3, [0.5] * 4, "std has 4 numbers"),
        ([0.5] * 3, [0.5, 0.0, 0.5], "would divide by zero"),
        ([0.5] * 3, [0.5, 1e-60, 0.5], "has a 0 in torch.float32"),
    ],
)
def test_normalize_refuses_wrong_lengths_and_zero(mean: list[float], std: list[float], reason: str) -> None:
    x = random_tensor(1, 3, 2, 2)
    with pytest.raises(ValueError, match=reason):
        utils.normalize(x, mean, std)


def test_normalize_leaves_its_input() -> None:
    x = torch.ones(1, 3, 2, 2)
    utils.normalize(x, [0.5], [0.5])
    assert torch.equal(x, torch.ones(1, 3, 2, 2))
