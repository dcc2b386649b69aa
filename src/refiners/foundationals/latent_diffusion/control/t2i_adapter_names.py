"""What the parameters of a T2I-Adapter are called in diffusers and in the authors' files, and its sizes by a file."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from refiners.foundationals.latent_diffusion.control.t2i_adapter_encoder import (
    SD1_T2I,
    SD1_T2I_LIGHT,
    SDXL_T2I,
    ConditionEncoder,
    T2ISpec,
)
from refiners.foundationals.latent_diffusion.files.parts_folder import UNCHANGED
from refiners.foundationals.latent_diffusion.unet_spec import UNetSpec
from refiners.weights.files import write_safetensors
from refiners.weights.matching import match_all
from refiners.weights.rules import Names, Target
from refiners.weights.tensors import read_tensors

RESIDUAL_BLOCK = Names({"Conv2d_1": "block1", "Conv2d_2": "block2"})


def diffusers_names(spec: T2ISpec) -> Names:
    """Ours to those of diffusers' `T2IAdapter`."""
    residual = _number("Residual", spec.blocks_per_level)
    level = Names({**_projections(spec), residual: (f"resnets.{_count(residual)}", RESIDUAL_BLOCK)})
    ours = _number("FeatureLevel", len(spec.channels))
    return Names(
        {
            "Conv2d": "adapter.conv_in",
            f"Cascade.{ours}": (f"adapter.body.{_count(ours)}", level),
        }
    )


def authors_names(spec: T2ISpec) -> Names:
    """Ours to those of the authors' files, where a full adapter's residual blocks of all levels are in one row."""
    residual = _number("Residual", spec.blocks_per_level)
    ours = _number("FeatureLevel", len(spec.channels))
    if spec.is_light:
        level = Names({**_projections(spec), residual: (f"body.{_count(residual)}", RESIDUAL_BLOCK)})
        return Names({f"Cascade.{ours}": (f"body.{_count(ours)}", level)})
    rules: dict[str, Target] = {"Conv2d": "conv_in"}
    for index in range(len(spec.channels)):
        level = f"Cascade.{ours.format(n=index + 1)}"
        rules[f"{level}.Conv2d"] = f"body.{index * spec.blocks_per_level}.in_conv"
        for block in range(spec.blocks_per_level):
            theirs = f"body.{index * spec.blocks_per_level + block}"
            rules[f"{level}.{residual.format(n=block + 1)}"] = (theirs, RESIDUAL_BLOCK)
    return Names(rules)


def _projections(spec: T2ISpec) -> "dict[str, Target]":
    return {"Conv2d_1": "in_conv", "Conv2d_2": "out_conv"} if spec.is_light else {"Conv2d": "in_conv"}


def _number(name: str, count: int) -> str:
    """The slots of children of one class: a lone one has no number with us."""
    return name if count == 1 else f"{name}_{{n}}"


def _count(ours: str) -> str:
    return "{n-1}" if ours.endswith("}") else "0"


def load_condition_encoder(
    weights: Path | str | Mapping[str, Tensor],
    spec: T2ISpec | None = None,
    unet_spec: UNetSpec | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ConditionEncoder:
    """A condition encoder with the weights of a file, with the names of diffusers, of the authors, or ours.

    weights: a file, a folder of diffusers, or the tensors themselves.
    spec: None takes it from the tensors, if they are of a kind that was published: full or light for Stable
        Diffusion 1, full for XL.
    unet_spec: of the UNet that it is for; lets full adapters for it be recognised that are of no published kind.
    Raises ValueError, which names them, for tensors that do not fit, FileNotFoundError.
    """
    tensors, where = _read(weights)
    form = _form_of(tensors)
    spec = spec or _spec_of(tensors, form, where, unet_spec)
    encoder = ConditionEncoder(spec, device="meta")
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    matched = match_all(tensors, form(spec), shapes, where)
    dtype = dtype or torch.get_default_dtype()
    matched = {name: tensor.to(device=device or "cpu", dtype=dtype) for name, tensor in matched.items()}
    encoder.load_state_dict(matched, assign=True)
    return encoder


def _read(weights: Path | str | Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], str]:
    if isinstance(weights, Mapping):
        return weights, "the tensors of a T2I-Adapter"
    path = Path(weights)
    if path.is_dir():
        path = path / "diffusion_pytorch_model.safetensors"
    return read_tensors(path), str(path)


def _form_of(tensors: Mapping[str, Tensor]) -> Callable[[T2ISpec], Names]:
    if any(name.startswith("adapter.") for name in tensors):
        return diffusers_names
    if any(name.startswith("Cascade.") for name in tensors):
        return lambda spec: UNCHANGED
    return authors_names


def _spec_of(
    tensors: Mapping[str, Tensor], form: Callable[[T2ISpec], Names], where: str, unet: UNetSpec | None
) -> T2ISpec:
    """That of the adapter which sees as many values at a time, with the widths of the file."""
    for kind in (SD1_T2I_LIGHT, SD1_T2I, SDXL_T2I, *([] if unet is None else _kinds_for(unet))):
        names, levels = form(kind), [f"Cascade.FeatureLevel_{level + 1}" for level in range(len(kind.channels))]
        first = f"{levels[0]}.Conv2d_1.weight" if kind.is_light else "Conv2d.weight"
        last = "Conv2d_2.weight" if kind.is_light else "Residual_1.Conv2d_2.weight"
        found = [tensors.get(str(names.to_theirs(name))) for name in (first, *(f"{level}.{last}" for level in levels))]
        sizes = [tensor.shape[:2] for tensor in found if tensor is not None and tensor.ndim == 4]
        colours = {count * kind.unshuffle_factor**2: count for count in (1, 3)}
        if len(sizes) == len(found) and sizes[0][1] in colours:
            channels = tuple(size[0] for size in sizes[1:])
            return replace(kind, channels=channels, in_channels=colours[sizes[0][1]])
    raise ValueError(
        f"{where}: this is none of the published T2I-Adapters (for Stable Diffusion 1, full or light, and for XL); if "
        "it is another, give its spec"
    )


def _kinds_for(unet: UNetSpec) -> list[T2ISpec]:
    return [T2ISpec.for_unet(unet, downsampling_factor) for downsampling_factor in (1, 2, 4, 8, 16)]


def save_condition_encoder(path: Path | str, encoder: ConditionEncoder) -> None:
    """Write the weights with diffusers' names. Raises FileNotFoundError if there is no such folder."""
    names = diffusers_names(encoder.spec)
    write_safetensors(path, {str(names.to_theirs(name)): tensor for name, tensor in encoder.state_dict().items()})
