"""What a picture was made with, and how that is written into the picture, so that it can be made again.

A PNG carries two texts: `refiners`, the settings as JSON, and `parameters`, the same in the form that A1111's web UI
introduced and other programs show.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, cast, get_type_hints

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from refiners.foundationals.latent_diffusion.files.pretrained import BUILTIN
from refiners.foundationals.latent_diffusion.generation import REFINER_START

JSON_KEY, TEXT_KEY = "refiners", "parameters"
# The settings that name files, besides the model.
FILE_SETTINGS = ("init_image", "mask", "loras", "controls", "ip_adapter", "image_prompts", "image_encoder")
# What A1111's web UI calls our solvers.
SAMPLER_NAMES = {
    "ddim": "DDIM",
    "dpm-solver": "DPM++ 2M",
    "euler": "Euler",
    "euler-ancestral": "Euler a",
    "heun": "Heun",
    "lcm": "LCM",
    "unipc": "UniPC",
}


@dataclass(frozen=True)
class Settings:
    """Everything that a picture depends on. None, and "auto": as the model or the machine has it.

    size: width and height in pixels, such as "512x768".
    init_image, mask, loras, model: as the user named them; a LoRA may end with `:SCALE`.
    refiner: a model that takes over, as the user named it; may end with `:SHARE`, of the way, at which it does.
    controls: `FILE:PICTURE`, of a ControlNet and the like and the picture it sees; may end with `:SCALE`.
    ip_adapter, image_prompts: a file, and pictures for it; each may end with `:SCALE`.
    """

    prompt: str = ""
    negative: str = ""
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    solver: str | None = None
    size: str | None = None
    init_image: str | None = None
    strength: float = 0.75
    mask: str | None = None
    loras: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    ip_adapter: str | None = None
    image_prompts: tuple[str, ...] = ()
    image_encoder: str | None = None
    model: str = BUILTIN
    refiner: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    tile_size: int | None = None

    def changed(self, **changes: Any) -> Self:
        """These settings with those that are not None put in place."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def height_and_width(self) -> tuple[int, int] | None:
        """The size in the order of tensors. Raises ValueError if it does not read as WIDTHxHEIGHT."""
        if self.size is None:
            return None
        width, _, height = self.size.lower().partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise ValueError(f"the size {self.size!r} should be WIDTHxHEIGHT in pixels, such as 512x768")
        return int(height), int(width)

    def scaled_loras(self) -> list[tuple[str, float]]:
        """File and scale of each LoRA; 1 if none is given. A file of the whole name, colon and all, comes first."""
        return [split_scale(text) for text in self.loras if text]

    def scaled_controls(self) -> list[tuple[str, str, float]]:
        """File, picture and scale of each control. Raises ValueError if a text does not read so."""
        return [split_control(text) for text in self.controls if text]

    def scaled_ip_adapter(self) -> tuple[str, float]:
        """File and scale of the IP-Adapter, if there is one."""
        return split_scale(self.ip_adapter or "")

    def refiner_and_start(self) -> tuple[str, float]:
        """The model that takes over, if there is one, and the share of the way at which it does."""
        return split_scale(self.refiner or "", REFINER_START)

    def scaled_image_prompts(self) -> list[tuple[str, float]]:
        """File and scale of each picture that is a prompt."""
        return [split_scale(text) for text in self.image_prompts if text]

    def files(self) -> list[Path]:
        """The files, besides the model, that the picture depends on."""
        names = [self.init_image, self.mask, *(file for file, _ in self.scaled_loras())]
        names += [name for file, picture, _ in self.scaled_controls() for name in (file, picture)]
        if self.ip_adapter:
            names += [self.scaled_ip_adapter()[0], *(file for file, _ in self.scaled_image_prompts())]
            names += [self.image_encoder] if self.image_encoder != BUILTIN else []
        return [Path(name) for name in names if name]


def split_scale(text: str, default: float = 1.0) -> tuple[str, float]:
    """`FILE:SCALE` as a file and a scale, or the default one. Raises ValueError if the scale is no number."""
    file, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, default
    try:
        return file, float(scale)
    except ValueError:
        if Path(file).exists():
            raise ValueError(f"the scale of {text!r} should be a number, such as {file}:0.8") from None
        return text, default


def split_control(text: str) -> tuple[str, str, float]:
    """`FILE:PICTURE:SCALE` as two files that exist and a scale, 1 if none is given. Raises ValueError for others."""
    wholes = [(text, 1.0)]
    head, _, tail = text.rpartition(":")
    with suppress(ValueError):
        wholes.append((head, float(tail)))
    for whole, scale in wholes:
        parts = whole.split(":")
        for index in range(1, len(parts)):
            file, picture = ":".join(parts[:index]), ":".join(parts[index:])
            if Path(file).exists() and Path(picture).is_file():
                return file, picture, scale
    raise ValueError(
        f"the control {text!r} should be FILE:PICTURE or FILE:PICTURE:SCALE, such as canny.safetensors:edges.png:0.8, "
        "and both files must be there"
    )


def png_texts(settings: Settings) -> PngInfo:
    """What to write into a picture that was made with these settings, all of them known."""
    content = {
        "version": version("refiners"),
        "torch": version("torch"),
        "settings": asdict(settings),
        "files": {str(path): digest(path) for path in settings.files()},
    }
    texts = PngInfo()
    texts.add_text(TEXT_KEY, readable_text(settings))
    texts.add_text(JSON_KEY, json.dumps(content))
    return texts


def readable_text(settings: Settings) -> str:
    """The settings in the form of A1111's web UI, as well as it can say them."""
    loras = [f"<lora:{Path(file).stem}:{scale:g}>" for file, scale in settings.scaled_loras()]
    refiner, start = settings.refiner_and_start()
    entries: dict[str, object] = {
        "Steps": settings.steps,
        "Sampler": SAMPLER_NAMES.get(settings.solver or "", settings.solver),
        "CFG scale": None if settings.guidance is None else f"{settings.guidance:g}",
        "Seed": settings.seed,
        "Size": settings.size,
        "Model": Path(settings.model).stem,
        "Refiner": Path(refiner).stem if refiner else None,
        "Refiner switch at": f"{start:g}" if refiner else None,
        "Denoising strength": f"{settings.strength:g}" if settings.init_image else None,
        **{
            f"ControlNet {index}": f'"Model: {Path(file).stem}, Weight: {scale:g}"'
            for index, (file, _, scale) in enumerate(settings.scaled_controls())
        },
        "Version": f"refiners {version('refiners')}",
    }
    lines = [
        " ".join([settings.prompt, *loras]),
        *([f"Negative prompt: {settings.negative}"] if settings.negative else []),
        ", ".join(f"{name}: {value}" for name, value in entries.items() if value is not None),
    ]
    return "\n".join(lines)


def read_settings(picture: Path | str) -> tuple[Settings, dict[str, str]]:
    """The settings in a picture, and the SHA-256 of each file that it was made with.

    Raises ValueError if it has none, or none that can be read; OSError if it is no picture.
    """
    with Image.open(picture) as image:
        image.load()  # texts may come after the pixels
        text, other = image.info.get(JSON_KEY), image.info.get(TEXT_KEY)
    if text is None:
        hint = "; what another program wrote there cannot be repeated exactly" if other else ""
        raise ValueError(
            f"{picture}: this picture has no settings of refiners in it{hint}; give one that `refiners generate` made, "
            "and that no other program saved again"
        )
    try:
        content = _entries(json.loads(text), "the text")
        digests = _entries(content.get("files", {}), "'files'")
        return _settings_from(_entries(content.get("settings"), "'settings'")), digests
    except ValueError as error:
        raise ValueError(f"{picture}: its settings cannot be read ({error})") from error


def _entries(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} should be a JSON object, but it is a {type(value).__name__}")
    return cast("dict[str, Any]", value)


def _settings_from(entries: dict[str, Any]) -> Settings:
    types = get_type_hints(Settings)
    read: dict[str, Any] = {}
    for name, value in entries.items():
        if name not in types:
            raise ValueError(f"this version of refiners does not know {name!r}; a newer one may")
        is_list = types[name] == tuple[str, ...]
        read[name] = _read_list(name, value) if is_list else _checked(name, value, types[name])
    return Settings(**read)


def _read_list(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name!r} should be a list, but it is {value!r:.80}")
    return tuple(_checked(name, each, str) for each in cast("list[Any]", value))


def _checked(name: str, value: Any, kind: Any) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name!r} cannot be {value!r:.80}")
    return value


def check_digests(files: list[Path], digests: Mapping[str, str]) -> None:
    """Raise ValueError if a file is not the one that a picture was made with."""
    for path in files:
        if digests.get(str(path)) not in (None, digest(path)):
            raise ValueError(
                f"{path}: this file is not the one that the picture was made with, or has changed since; to use it all "
                "the same, name it with its option, such as --init-image, --lora or --control"
            )


def digest(path: Path) -> str:
    """SHA-256 of a file, or of all files in a folder."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
