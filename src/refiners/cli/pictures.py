"""The work of `refiners generate`: settings put together and checked, then one picture after the other.

Each picture is a batch of its own, so that it can be repeated alone, bit by bit.
"""

import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import typer

from refiners.cli.conditioning import default_image_encoder, lead
from refiners.cli.models import choose_device, choose_dtype, load_model
from refiners.cli.settings import FILE_SETTINGS, Settings, check_digests, png_texts, read_settings
from refiners.cli.sources import open_picture
from refiners.foundationals.latent_diffusion import StableDiffusion
from refiners.foundationals.latent_diffusion.lora import LoraWeights
from refiners.solvers import SOLVERS, solver_by_name
from refiners.weights.header import check_is_file

MAX_SEED = 2**64 - 1
FIELDS = re.compile(r"\{(prompt|seed|number)\}")


def make_pictures(
    prompts: Sequence[str], seeds: Sequence[int], given: Mapping[str, Any], like: Path | None, out: Path
) -> None:
    """Make a picture for each prompt and seed, write it, and print where.

    given: settings by name, None where nothing was said.  like: a picture whose settings count where nothing was said.
    Raises ValueError, OSError before anything is made if something cannot be right.
    """
    settings = _settings(given, like)
    if given["strength"] is not None and not settings.init_image:
        raise ValueError("a strength says how much of a picture to change, but there is none: give --init-image too")
    pictures = _pictures(settings, prompts, seeds, is_repeated=like is not None)
    _check(pictures)
    paths = picture_paths(out, pictures)
    model, refiner, settings = _prepared(settings)
    for path, picture in zip(paths, pictures, strict=True):
        make_picture(model, refiner, replace(settings, prompt=picture.prompt, seed=picture.seed), path)
        typer.echo(f"{path}  seed {picture.seed}")


def _settings(given: Mapping[str, Any], like: Path | None) -> Settings:
    """What was said, and for the rest what the picture says that is to be repeated."""
    if like is None:
        return Settings().changed(**given)
    check_is_file(like)
    recorded, digests = read_settings(like)
    settings = recorded.changed(**given)
    untouched = Settings().changed(**{name: getattr(recorded, name) for name in FILE_SETTINGS if given[name] is None})
    _check_files(untouched)
    check_digests(untouched.files(), digests)
    if given["device"] is None:
        settings = replace(settings, device=_device_like(recorded.device))
    return settings


def _device_like(name: str) -> str:
    try:
        choose_device(name)
    except ValueError:
        typer.echo(f"made on {name}, which is not here: the picture may differ in its last bits", err=True)
        return "auto"
    return name


def _pictures(settings: Settings, prompts: Sequence[str], seeds: Sequence[int], is_repeated: bool) -> list[Settings]:
    """The settings of each picture: one prompt and one seed for all, or one for each."""
    if not prompts and not is_repeated:
        raise ValueError("there is no prompt: say what to show, or name a picture to repeat with --like")
    prompts = prompts or [settings.prompt]
    if not seeds:
        is_fixed = is_repeated and len(prompts) == 1
        seeds = [settings.seed] if is_fixed else [secrets.randbelow(2**32) for _ in prompts]
    count = max(len(prompts), len(seeds))
    if len(prompts) not in (1, count) or len(seeds) not in (1, count):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one for all pictures, or one for each")
    rows = zip(_as_many(prompts, count), _as_many(seeds, count), strict=True)
    return [replace(settings, prompt=prompt, seed=seed) for prompt, seed in rows]


def _as_many(values: Sequence[Any], count: int) -> list[Any]:
    return list(values) * (count // len(values))


def _check(pictures: Sequence[Settings]) -> None:
    """Raise ValueError, FileNotFoundError for what can be known to be wrong without the model."""
    for picture in pictures:
        if not picture.prompt.strip() and picture.guidance != 1 and not picture.ip_adapter:
            raise ValueError("the prompt is empty: say what to show, or take --guidance 1 to leave it to the model")
        if not 0 <= picture.seed <= MAX_SEED:
            raise ValueError(f"the seed {picture.seed} should be from 0 to {MAX_SEED}")
    settings = pictures[0]
    if settings.mask and not settings.init_image:
        raise ValueError("a mask says what to change of a picture, but there is none: give --init-image too")
    if bool(settings.ip_adapter) != bool(settings.scaled_image_prompts()):
        raise ValueError("an IP-Adapter and pictures as prompts go together: give --ip-adapter and --image-prompt")
    if settings.solver:
        solver_by_name(settings.solver)
    settings.height_and_width()
    if settings.guidance is not None and not isfinite(settings.guidance):
        raise ValueError(f"--guidance is {settings.guidance}, but should be a finite number, mostly 1 to 15")
    if settings.refiner and not 0 < settings.refiner_and_start()[1] < 1:
        raise ValueError(f"the refiner {settings.refiner!r} should start at a share of the way, above 0 and below 1")
    _check_files(settings)


def _check_files(settings: Settings) -> None:
    for path in settings.files():
        if not path.is_dir():  # a LoRA can be a folder
            check_is_file(path)


def _prepared(settings: Settings) -> tuple[StableDiffusion, StableDiffusion | None, Settings]:
    """The model with its LoRAs, its refiner if there is one, and the settings with what follows from the model."""
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    model = load_model(settings.model, device, dtype)
    where, start = settings.refiner_and_start()
    refiner = load_model(where, device, dtype) if where else None
    if model.spec.is_inpainting and not settings.mask:
        raise ValueError(f"{settings.model}: this model fills in pictures: give it --init-image and --mask")
    for file, scale in settings.scaled_loras():
        typer.echo(str(LoraWeights(file).patch(model, scale=scale)), err=True)
    if settings.ip_adapter and not settings.image_encoder:
        encoder = default_image_encoder(settings.scaled_ip_adapter()[0], settings.model)
        settings = replace(settings, image_encoder=encoder)
    first = open_picture(settings.init_image) if settings.init_image else None
    lead(model, settings, settings.height_and_width() or model.size_for(first))
    own_solver = next(name for name, solver in SOLVERS.items() if isinstance(model.solver, solver))
    settings = replace(
        settings,
        refiner=f"{where}:{start:g}" if where else None,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        guidance=model.spec.condition_scale if settings.guidance is None else settings.guidance,
        steps=model.solver.num_inference_steps if settings.steps is None else settings.steps,
        solver=settings.solver or own_solver,
    )
    return model, refiner, settings


def make_picture(model: StableDiffusion, refiner: StableDiffusion | None, settings: Settings, path: Path) -> None:
    """Make one picture and write it, with its settings in it. Raises ValueError if they do not fit the model."""
    image = model.generate(
        settings.prompt,
        settings.negative,
        seed=settings.seed,
        num_inference_steps=settings.steps,
        condition_scale=settings.guidance,
        solver=settings.solver,
        size=settings.height_and_width(),
        init_image=open_picture(settings.init_image) if settings.init_image else None,
        strength=settings.strength,
        mask=open_picture(settings.mask) if settings.mask else None,
        refiner=refiner,
        refiner_start=settings.refiner_and_start()[1],
        tile_size=settings.tile_size,
        show_progress=sys.stdout.isatty(),
    )[0]
    image.save(path, pnginfo=png_texts(replace(settings, size=f"{image.width}x{image.height}")))


def picture_paths(out: Path, pictures: Sequence[Settings]) -> list[Path]:
    """Where to write each picture; a folder is made if need be, and pictures in it are never overwritten.

    Raises ValueError for another kind of file than PNG, FileNotFoundError if the folder of a file does not exist.
    """
    if out.suffix and not out.is_dir():
        if out.suffix.lower() != ".png":
            raise ValueError(f"{out}: pictures are written as .png, which can carry their settings; choose such a name")
        if not out.parent.is_dir():
            raise FileNotFoundError(f"{out}: the folder {str(out.parent)!r} does not exist; create it first")
        is_pattern = FIELDS.search(out.name) is not None
        name = out.name if is_pattern or len(pictures) == 1 else f"{out.stem}-{{number}}{out.suffix}"
        return _unlike([out.parent / _filled(name, picture, number) for number, picture in enumerate(pictures, 1)])
    out.mkdir(parents=True, exist_ok=True)
    names = [_filled("{prompt}-{seed}.png", picture, number) for number, picture in enumerate(pictures, 1)]
    return _unlike([out / name for name in names], set(out.iterdir()))


def _filled(pattern: str, picture: Settings, number: int) -> str:
    words = re.sub(r"\W+", "-", picture.prompt.lower())[:40].strip("-") or "picture"
    values = {"prompt": words, "seed": picture.seed, "number": number}
    return FIELDS.sub(lambda field: str(values[field[1]]), pattern)


def _unlike(paths: Sequence[Path], taken: set[Path] | None = None) -> list[Path]:
    """The paths, with a number added to those that are taken, or come twice."""
    taken, free = set(taken or ()), list[Path]()
    for path in paths:
        candidate, number = path, 1
        while candidate in taken:
            number += 1
            candidate = path.with_stem(f"{path.stem}-{number}")
        taken.add(candidate)
        free.append(candidate)
    return free
