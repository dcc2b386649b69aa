"""Models for commands: loaded by name, on a device and in a dtype that are named too."""

import torch

from refiners.cli.sources import check_is_model
from refiners.foundationals.latent_diffusion import StableDiffusion

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(where: str, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
    """Load a model. Raises ValueError for files that are damaged or of another kind, FileNotFoundError if none."""
    check_is_model(where)
    return StableDiffusion.from_pretrained(where, device=device, dtype=dtype)


def choose_device(name: str) -> torch.device:
    """The device of that name, or for "auto" the fastest. Raises ValueError if the machine has none such."""
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    kind, _, number = name.partition(":")
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    if kind not in counts or (":" in name and not number.isdecimal()):
        raise ValueError(f"there is no device {name!r}; choose from auto, {', '.join(counts)}")
    if int(number or 0) >= counts[kind]:
        raise ValueError(
            f"the device is {name!r}, but torch {torch.__version__} sees {counts[kind]} {kind.upper()} devices here: "
            "use --device cpu, or install a driver and a build of torch for it"
        )
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format of that name, or for "auto" what suits the device. Raises ValueError if there is none."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"there is no dtype {name!r}; choose from auto, {', '.join(DTYPES)}")
    return DTYPES[name]
