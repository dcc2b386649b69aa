"""The texts of `refiners inspect`, and what files hold in a few words."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from refiners.cli.sources import empty_model, empty_model_for_lora
from refiners.fluxion.tree import readable_count
from refiners.foundationals.clip.names import text_encoder_names
from refiners.foundationals.clip.open_clip import separated
from refiners.foundationals.latent_diffusion import (
    StableDiffusionSpec,
    autoencoder_names,
    unet_names,
)
from refiners.foundationals.latent_diffusion.files import single_file
from refiners.foundationals.latent_diffusion.files.parts_folder import UNCHANGED
from refiners.foundationals.latent_diffusion.lora import inspect_lora
from refiners.weights.formats import Content, Family, Identity, identify
from refiners.weights.header import DTYPES, read_header
from refiners.weights.lora_keys import LoraFile
from refiners.weights.matching import match
from refiners.weights.rules import Names
from refiners.weights.torch_files import is_torch_file, read_torch

PARTS = ("clip_text_encoder", "unet", "lda")
LOADABLE = (Family.SD1, Family.SDXL, None)
MAX_GROUPS = 12  # a table of more lines than this says less than none
MAX_VALUE_LENGTH = 160
Rules = Callable[[StableDiffusionSpec], tuple[str, Names]]


def _text_encoder_rules(spec: StableDiffusionSpec) -> tuple[str, Names]:
    """Those of the last text encoder, by which models of several are told."""
    name, text = list(spec.text_encoders.items())[-1]
    path = spec.text_encoder_paths[name]
    return f"clip_text_encoder.{path}.".replace("..", "."), text_encoder_names(text)


# What a file can be held against: the part of the model that it is ("" for all), and its names.
RULES: dict[tuple[Content, str], Rules] = {
    (Content.CHECKPOINT, "the original files"): lambda spec: ("", single_file.names(spec)),
    (Content.UNET, "diffusers"): lambda spec: ("unet.", unet_names.diffusers_names(spec.unet)),
    (Content.UNET, "Refiners"): lambda spec: ("unet.", UNCHANGED),
    (Content.AUTOENCODER, "diffusers"): lambda spec: ("lda.", autoencoder_names.diffusers_names(spec.autoencoder)),
    (Content.AUTOENCODER, "Refiners"): lambda spec: ("lda.", UNCHANGED),
    (Content.TEXT_ENCODER, "transformers"): _text_encoder_rules,
    (Content.TEXT_ENCODER, "Refiners"): lambda spec: ("clip_text_encoder.", UNCHANGED),
}


def report_model(where: str, depth: int) -> None:
    """Print the trees of a model, its parameters, the memory that they take, and its files if they are here."""
    model = empty_model(where)
    console = _console()
    console.print(f"{where}: pictures of {model.spec.default_size}x{model.spec.default_size}")
    counts = {name: _count(getattr(model, name)) for name in PARTS}
    table = _table("part", "parameters", "in float32", "in float16")
    for name, count in [*counts.items(), ("all", sum(counts.values()))]:
        table.add_row(name, readable_count(count), readable_bytes(4 * count), readable_bytes(2 * count))
    console.print(table)
    folder = Path(where)
    if folder.is_dir():
        for path in sorted(path for pattern in ("*.safetensors", "*.bin") for path in folder.rglob(pattern)):
            console.print(f"{path.relative_to(folder)}: {described_storage(read_shapes(path))}")
    for name in PARTS:
        console.print(f"\n{name}: {pruned_tree(getattr(model, name), depth)}")


def report_file(path: Path, depth: int) -> None:
    """Print what a weights file is, what it holds, whether it fits, and the trees of a whole model."""
    tensors = read_shapes(path)
    identity = identify({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    console = _console()
    console.print(f"{path}: {identity}")
    console.print(described_storage(tensors))
    groups = Counter(name.partition(".")[0] for name in tensors)
    if 1 < len(groups) <= MAX_GROUPS:
        table = _table("part", "tensors, parameters, memory, dtypes")
        for group in groups:
            own = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] == group}
            table.add_row(group, described_storage(own))
        console.print(table)
    if path.suffix == ".safetensors":
        for key, value in read_header(path).metadata.items():
            console.print(f"{key}: {value if len(value) <= MAX_VALUE_LENGTH else value[:MAX_VALUE_LENGTH] + '…'}")
    console.print(described_fit(path, identity, tensors))
    if identity.content is Content.CHECKPOINT and identity.family in LOADABLE:
        report_model(str(path), depth)


def report_lora(lora: LoraFile, model: str | None) -> None:
    """Print what a LoRA is, and what of it would attach to a model: by default the released one of its family."""
    tree = empty_model(model) if model else empty_model_for_lora(lora)
    _console().print(str(inspect_lora(lora, tree)))


def read_shapes(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file without their values; of a safetensors file only the header is read.

    Raises ValueError if the file is damaged or none of weights.
    """
    if is_torch_file(path):
        return {name: tensor.to("meta") for name, tensor in read_torch(path).items()}
    return {
        name: torch.empty(_torch_shape(info.dtype, info.shape), dtype=DTYPES[info.dtype], device="meta")
        for name, info in read_header(path).tensors.items()
    }


def _torch_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The header counts 4-bit values one by one, torch in pairs."""
    return (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape


def described_fit(path: Path, identity: Identity, tensors: Mapping[str, Tensor]) -> str:
    """Whether every tensor of a file has its place in a model of its family, by default Stable Diffusion 1."""
    if (identity.content, identity.form) not in RULES:
        return "what it would fit is not known"
    is_whole = identity.content is Content.CHECKPOINT
    is_loadable = is_whole and identity.family in LOADABLE
    model = empty_model(str(path)) if is_loadable else empty_model(family=identity.family)
    prefix, names = RULES[identity.content, identity.form](model.spec)
    shapes = {
        name.removeprefix(prefix): tensor.shape
        for name, tensor in model.state_dict().items()
        if name.startswith(prefix)
    }
    tensors = separated(tensors) if is_whole else tensors
    matched, misfits = match(tensors, names, shapes)
    what = f"{prefix.removesuffix('.') or 'all'} of {model.spec.family}"
    return f"does not fit {what}: {misfits}" if str(misfits) else f"fits {what}: {len(matched)} tensors have a place"


def pruned_tree(module: nn.Module, depth: int) -> str:
    """The tree as it prints itself, down to a number of levels below its top."""
    head, *lines = repr(module).splitlines()
    return "\n".join([head, *(line for line in lines if _level(line) <= depth)])


def _level(line: str) -> int:
    """How deep a line of a printed tree is: each level indents by four characters."""
    branch = min(found for mark in ("├── ", "└── ") if (found := line.find(mark)) >= 0)
    return branch // 4 + 1


def described_storage(tensors: Mapping[str, Tensor]) -> str:
    """How many tensors there are, and what they hold.

    >>> described_storage({"weight": torch.zeros(2, 3), "bias": torch.zeros(2, dtype=torch.float16)})
    '2 tensors, 8 parameters, 28 B, float16 and float32'
    """
    count = sum(tensor.numel() for tensor in tensors.values())
    size = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    dtypes = " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))
    return ", ".join(
        [f"{len(tensors)} tensors", f"{readable_count(count)} parameters", readable_bytes(size), dtypes or "no dtype"]
    )


def readable_bytes(count: int) -> str:
    """A size in three digits or so, in units of 1024.

    >>> readable_bytes(512), readable_bytes(1536), readable_bytes(3 * 2**30)
    ('512 B', '1.5 KiB', '3 GiB')
    """
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _console() -> Console:
    return Console(soft_wrap=True, highlight=False, markup=False)


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False)
