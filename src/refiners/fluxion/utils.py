"""Small tools for every model: seeds, weights files, pictures as tensors, and a few filters on them.

Pictures are (1, c, h, w) with values in [0, 1]; c is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha).
"""

import random
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

from refiners.fluxion.checks import picture
from refiners.weights.files import (
    read_metadata,
    read_safetensors,
    write_safetensors,
)
from refiners.weights.torch_files import read_torch

# torch's own class, not one derived from it: torch.compile knows it by identity.
no_grad = torch.no_grad

_Number = TypeVar("_Number", int, float)

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def manual_seed(seed: int) -> None:
    """Seed the generators of torch (all devices), numpy and Python's `random`.

    seed: -2**63 … 2**64-1, as for torch; numpy gets its lowest 32 bits.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]  # torch leaves it untyped


def load_from_safetensors(path: Path | str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read all tensors of a safetensors file. Raises ValueError, FileNotFoundError, IsADirectoryError."""
    return read_safetensors(path, device=device)


def load_metadata_from_safetensors(path: Path | str) -> dict[str, str] | None:
    """Read the metadata of a safetensors file, None if it has none. Raises as `load_from_safetensors`."""
    return read_metadata(path) or None


def save_to_safetensors(path: Path | str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. Raises TypeError, ValueError, FileNotFoundError."""
    write_safetensors(path, tensors, metadata=metadata)


def load_tensors(path: Path | str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a torch file (.pt, .pth, .bin, .ckpt) that holds only tensors.

    Raises ValueError if it holds anything else or wants to run code; FileNotFoundError, IsADirectoryError.
    """
    return read_torch(path, device=device)


def image_to_tensor(
    image: Image.Image, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Float[Tensor, "1 c h w"]:
    """Turn a picture into a tensor in [0, 1], float32 unless `dtype` says otherwise.

    L gives 1 channel, LA 2, RGB 3, RGBA 4. Mode 1 is read as L; P and PA as RGB, or as RGBA if they have transparency.
    Raises ValueError for other modes, and for a dtype that is not floating point; TypeError for what is no picture.
    """
    dtype = dtype or torch.float32
    picture(image)
    if not dtype.is_floating_point:
        raise ValueError(f"a picture in [0, 1] cannot be {dtype}; use a floating point dtype")
    pixels = torch.as_tensor(np.array(_with_plain_mode(image), dtype=np.uint8))
    channels_last = pixels.reshape(1, image.height, image.width, -1 if pixels.numel() else len(image.getbands()))
    return (channels_last.permute(0, 3, 1, 2).to(device, torch.float32) / 255).to(dtype).contiguous()


def images_to_tensor(
    images: Sequence[Image.Image], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Float[Tensor, "b c h w"]:
    """Turn pictures of one size and mode into a batch in [0, 1], as `image_to_tensor` does with one.

    Raises ValueError if there are none, or if they differ in size or number of channels.
    """
    tensors = [image_to_tensor(image, device=device, dtype=dtype) for image in images]
    if not tensors:
        raise ValueError("images_to_tensor was given no pictures; give at least one")
    for index, tensor in enumerate(tensors):
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"images_to_tensor: picture {index} gives shape {tuple(tensor.shape)}, but picture 0 gives "
                f"{tuple(tensors[0].shape)}; resize or convert them to one size and mode"
            )
    return torch.cat(tensors)


def tensor_to_image(tensor: Float[Tensor, "1 c h w"]) -> Image.Image:
    """Turn a tensor in [0, 1] into a picture of mode L, LA, RGB or RGBA; other values are clamped, then rounded.

    Undoes `image_to_tensor` exactly, in float16 and bfloat16 too.
    Raises ValueError for a batch that is not 1, channels other than 1 to 4, a dtype that is not floating point, or
    values that are NaN or infinite.
    """
    if tensor.ndim != 4 or tensor.shape[0] != 1 or tensor.shape[1] not in _MODES:
        raise ValueError(
            f"tensor_to_image needs a tensor of shape (1, c, h, w) with c from 1 to 4, but this one is "
            f"{tuple(tensor.shape)}; use tensor_to_images for a batch"
        )
    if not tensor.is_floating_point():
        raise ValueError(f"tensor_to_image needs floats in [0, 1], but this tensor is {tensor.dtype}; divide by 255")
    values = tensor.detach().float()
    strange = values.numel() - int(values.isfinite().sum())
    if strange:
        raise ValueError(
            f"tensor_to_image: {strange} of {values.numel()} values are NaN or infinite; find where they come from "
            "(often float16 overflow), or use torch.nan_to_num"
        )
    pixels = (values.clamp(0, 1) * 255).round().to("cpu", torch.uint8)[0].permute(1, 2, 0)
    height, width, channels = pixels.shape
    return Image.frombytes(_MODES[channels], (width, height), pixels.contiguous().numpy().tobytes())


def tensor_to_images(tensor: Float[Tensor, "b c h w"]) -> list[Image.Image]:
    """Turn a batch in [0, 1] into pictures, each as `tensor_to_image` does. Raises as that does."""
    if tensor.ndim != 4:
        raise ValueError(f"tensor_to_images needs shape (b, c, h, w), but this tensor is {tuple(tensor.shape)}")
    return [tensor_to_image(tensor[index : index + 1]) for index in range(len(tensor))]


def interpolate(
    x: Float[Tensor, "b c *spatial"],
    size: int | Sequence[int] | None = None,
    mode: str = "nearest",
    antialias: bool = False,
    factor: int | float | Sequence[float] | None = None,
) -> Float[Tensor, "b c *out"]:
    """Resize the spatial dimensions to `size`, or by `factor`; modes as in torch.nn.functional.interpolate.

    Raises ValueError unless exactly one of size and factor is given.
    """
    if (size is None) == (factor is None):
        raise ValueError(f"interpolate needs a size or a factor, but got size={size} and factor={factor}; give one")
    return functional.interpolate(
        x,
        size=list(size) if isinstance(size, Sequence) else size,
        scale_factor=list(factor) if isinstance(factor, Sequence) else factor,
        mode=mode,
        antialias=antialias,
    )


def gaussian_blur(
    tensor: Float[Tensor, "*batch h w"],
    kernel_size: int | Sequence[int],
    sigma: int | float | Sequence[float] | None = None,
) -> Float[Tensor, "*batch h w"]:
    """Blur with a Gaussian, equal to torchvision's `gaussian_blur`; borders are mirrored.

    kernel_size: odd, one number or (x, y), at most 2h-1 and 2w-1.  sigma: in pixels, one number or (x, y); by default
    0.3 * ((kernel_size - 1) / 2 - 1) + 0.8.
    Raises ValueError for other sizes, a sigma that is not positive, or a tensor that is not floating point.
    """
    size_x, size_y = _pair("kernel_size", kernel_size)
    sigma_x, sigma_y = (None, None) if sigma is None else _pair("sigma", sigma)
    if tensor.ndim < 2 or not tensor.is_floating_point():
        raise ValueError(
            f"gaussian_blur needs floats of shape (..., h, w), but got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    height, width = tensor.shape[-2:]
    for axis, length, taps in (("width", width, size_x), ("height", height, size_y)):
        if taps // 2 >= length:
            raise ValueError(
                f"gaussian_blur: kernel_size {taps} is too large for {axis} {length}; mirroring needs less"
            )
    row = gaussian_weights(size_x, sigma_x).to(tensor)
    column = gaussian_weights(size_y, sigma_y).to(tensor)
    x = tensor.reshape(prod(tensor.shape[:-2]), 1, height, width)
    x = functional.pad(x, (size_x // 2, size_x // 2, size_y // 2, size_y // 2), mode="reflect")
    x = functional.conv2d(x, row.reshape(1, 1, 1, -1))
    return functional.conv2d(x, column.reshape(1, 1, -1, 1)).reshape(tensor.shape)


def gaussian_weights(size: int, sigma: int | float | None) -> Tensor:
    """Those of `gaussian_blur` along one side: (size,), sum 1. Raises as that does."""
    if size < 1 or size % 2 == 0:
        raise ValueError(
            f"gaussian_blur: kernel_size should be odd and positive, but it is {size}; try {max(size, 0) | 1}"
        )
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8 if sigma is None else sigma
    if not sigma > 0:
        raise ValueError(f"gaussian_blur: sigma should be positive, but it is {sigma}")
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    return torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0)


def pad(
    x: Float[Tensor, "..."], pad: Iterable[int], value: float = 0.0, mode: str = "constant"
) -> Float[Tensor, "..."]:
    """Pad the last dimensions: (left, right, top, bottom, …), modes as in torch.nn.functional.pad.

    Raises ValueError if a value is given for a mode that takes none.
    """
    if mode == "constant":
        return functional.pad(x, list(pad), value=value)
    if value != 0.0:
        raise ValueError(f"pad: mode {mode!r} takes no value, but got {value}; leave it out or use mode 'constant'")
    return functional.pad(x, list(pad), mode=mode)


def normalize(
    tensor: Float[Tensor, "*batch c h w"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "*batch c h w"]:
    """(tensor - mean) / std for each channel, as torchvision's `normalize` does.

    mean, std: one number for each channel, or one for all.
    Raises ValueError for other lengths, a std that is 0 in the tensor's dtype, or a tensor that is not floating point.
    """
    if tensor.ndim < 3 or not tensor.is_floating_point():
        raise ValueError(
            f"normalize needs floats of shape (..., c, h, w), but got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    channels = tensor.shape[-3]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise ValueError(f"normalize: {name} has {len(values)} numbers, but the tensor has {channels} channels")
    means = torch.tensor(mean, dtype=tensor.dtype, device=tensor.device).reshape(-1, 1, 1)
    deviations = torch.tensor(std, dtype=tensor.dtype, device=tensor.device).reshape(-1, 1, 1)
    if bool((deviations == 0).any()):
        raise ValueError(
            f"normalize: std {tuple(std)} has a 0 in {tensor.dtype}, which would divide by zero; change it"
        )
    return (tensor - means) / deviations


def _with_plain_mode(image: Image.Image) -> Image.Image:
    if image.mode in _MODES.values():
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("P", "PA"):
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    raise ValueError(
        f"image_to_tensor cannot read mode {image.mode!r}, only {', '.join(_MODES.values())}, 1, P and PA; "
        "convert it first, such as image.convert('RGB')"
    )


def _pair(name: str, value: _Number | Sequence[_Number]) -> tuple[_Number, _Number]:
    values = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(values) != 2:
        raise ValueError(f"gaussian_blur: {name} should be one number or (x, y), but it is {values}")
    return values[0], values[1]
