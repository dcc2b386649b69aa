"""`refiners generate`: pictures from prompts, with their settings in them."""

from pathlib import Path
from typing import Annotated

import typer

from refiners.cli.errors import Debug, reported_errors

Prompts = Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="A picture is made for each.")]
Negative = Annotated[str | None, typer.Option(help="What not to show.")]
Seeds = Annotated[
    list[int] | None,
    typer.Option("--seed", help="One for all pictures, or one for each: repeat it. By default random."),
]
Steps = Annotated[
    int | None, typer.Option(help="From noise to picture; by default as many as the model has, mostly 30.")
]
Guidance = Annotated[
    float | None,
    typer.Option(help="How much the prompt counts; 1 for no guidance. By default the model's, mostly 7.5."),
]
SolverName = Annotated[
    str | None, typer.Option("--solver", help="Such as ddim or euler; a name that is none lists all of them.")
]
Size = Annotated[
    str | None,
    typer.Option(metavar="WIDTHxHEIGHT", help="In pixels. By default that of the first picture, or the model's own."),
]
InitImage = Annotated[str | None, typer.Option(metavar="PICTURE", help="Start from this picture instead of noise.")]
Strength = Annotated[
    float | None, typer.Option(help="How much of the first picture to change, above 0 to 1. By default 0.75.")
]
Mask = Annotated[str | None, typer.Option(metavar="PICTURE", help="Change only what is white in it.")]
Loras = Annotated[
    list[str] | None, typer.Option("--lora", metavar="FILE[:SCALE]", help="Add this LoRA. Repeat it for several.")
]
Controls = Annotated[
    list[str] | None,
    typer.Option(
        "--control",
        metavar="FILE:PICTURE[:SCALE]",
        help="Lead by a picture, with a ControlNet, a Control-LoRA or a T2I-Adapter. Repeat it for several.",
    ),
]
IPAdapterFile = Annotated[
    str | None, typer.Option("--ip-adapter", metavar="FILE[:SCALE]", help="What reads pictures as prompts.")
]
ImagePrompts = Annotated[
    list[str] | None,
    typer.Option(
        "--image-prompt",
        metavar="PICTURE[:SCALE]",
        help="A picture as a prompt besides the text. Repeat it for several.",
    ),
]
ImageEncoder = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="For --ip-adapter. By default in the folder image_encoder beside its file."),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="A folder, a file, or owner/name on the hub. By default `builtin`."),
]
Refiner = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL[:SHARE]",
        help="A model that goes on from that share of the way, by default 0.8, such as the refiner of XL.",
    ),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 … or mps. By default auto: the fastest.")]
Dtype = Annotated[
    str | None, typer.Option(help="auto, float32, float16 or bfloat16. By default auto: float16 on cuda, else float32.")
]
TileSize = Annotated[int | None, typer.Option(help="Decode in tiles of as many pixels, to save memory.")]
Out = Annotated[
    Path,
    typer.Option(
        help="A folder, or a .png file. With {prompt}, {seed} or {number} in its name it can be several files."
    ),
]
Like = Annotated[
    Path | None,
    typer.Option(metavar="PICTURE", help="Repeat this picture. What other options say comes first; '' takes away."),
]


def generate(
    prompts: Prompts = None,
    negative: Negative = None,
    seeds: Seeds = None,
    steps: Steps = None,
    guidance: Guidance = None,
    solver: SolverName = None,
    size: Size = None,
    init_image: InitImage = None,
    strength: Strength = None,
    mask: Mask = None,
    loras: Loras = None,
    controls: Controls = None,
    ip_adapter: IPAdapterFile = None,
    image_prompts: ImagePrompts = None,
    image_encoder: ImageEncoder = None,
    model: ModelName = None,
    refiner: Refiner = None,
    device: Device = None,
    dtype: Dtype = None,
    tile_size: TileSize = None,
    out: Out = Path("."),
    like: Like = None,
    debug: Debug = False,
) -> None:
    """Make pictures from prompts.

    The same seed and settings give the same picture, bit by bit. Each picture carries its settings: --like repeats it.
    """
    given = {
        "negative": negative,
        "steps": steps,
        "guidance": guidance,
        "solver": solver,
        "size": size,
        "init_image": init_image,
        "strength": strength,
        "mask": mask,
        "loras": tuple(loras) if loras else None,
        "controls": tuple(controls) if controls else None,
        "ip_adapter": ip_adapter,
        "image_prompts": tuple(image_prompts) if image_prompts else None,
        "image_encoder": image_encoder,
        "model": model,
        "refiner": refiner,
        "device": device,
        "dtype": dtype,
        "tile_size": tile_size,
    }
    with reported_errors(debug):
        from refiners.cli.pictures import make_pictures

        make_pictures(prompts or [], seeds or [], given, like, out)
