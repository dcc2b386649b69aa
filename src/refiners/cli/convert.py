"""`refiners convert`: models and LoRAs from one form of files to another; and what the scripts of that name do."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refiners.cli.errors import Debug, reported_errors

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "runwayml/stable-diffusion-v1-5"

Source = Annotated[str, typer.Argument(metavar="IN", help="A model (folder, file or owner/name on the hub) or a LoRA.")]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="The file or folder to write.")]
Form = Annotated[
    str,
    typer.Option(
        "--to",
        metavar="FORMAT",
        help="Of a model: diffusers (a folder), single-file (with the original names) or parts (a folder of our own "
        "files). Of a LoRA: kohya, diffusers or peft (a folder).",
    ),
]
Half = Annotated[bool, typer.Option("--half", help="Write float16; by default the dtype stays as it is.")]
ModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Of a LoRA: the model it is for, if not a released one."),
]


Lenient = Annotated[
    bool, typer.Option("--lenient", help="Of a LoRA: leave out what has no place in the model, and say what that is.")
]


def convert(
    source: Source,
    target: Target,
    form: Form,
    half: Half = False,
    model: ModelName = None,
    lenient: Lenient = False,
    debug: Debug = False,
) -> None:
    """Write a model or a LoRA in another form. Values stay what they are, bit by bit, unless --half is given.

    A LoRA is then read again and compared with what it was, layer by layer.
    """
    with reported_errors(debug):
        from refiners.cli.sources import find_lora

        if find_lora(source) is not None:
            _convert_lora(source, target, form, half, model, lenient)
            return
        for option, is_given in (("--model", model is not None), ("--lenient", lenient)):
            if is_given:
                raise ValueError(f"{source}: this is no LoRA, and {option} is for LoRAs: leave it out")
        _convert_model(source, target, form, half)


def _convert_model(source: str, target: Path, form: str, half: bool) -> None:
    from refiners.cli.reports import described_storage
    from refiners.cli.sources import check_is_model
    from refiners.foundationals.latent_diffusion.files.convert import read_model, write_model

    check_is_model(source)
    files = read_model(source)
    typer.echo(f"read {source}: {described_storage(files.tensors)}")
    write_model(files, target, form, as_dtype(half))
    typer.echo(f"wrote {target} ({form}{', float16' if half else ''})")


def _convert_lora(source: str, target: Path, form: str, half: bool, model: str | None, lenient: bool) -> None:
    from refiners.cli.sources import empty_model, empty_model_for_lora
    from refiners.foundationals.latent_diffusion.lora import compare_loras, convert_lora, inspect_lora

    tree = empty_model(model) if model else empty_model_for_lora(source)
    typer.echo(f"read {inspect_lora(source, tree if lenient else None)}")
    count = convert_lora(source, target, tree, format=form, dtype=as_dtype(half), strict=not lenient)
    typer.echo(f"wrote {target} ({form}{', float16' if half else ''}): {count} updates")
    typer.echo(f"read it again: {compare_loras(source, target, tree, strict=not lenient)}")


def as_dtype(half: bool) -> "torch.dtype | None":
    """What `--half` asks for; None for the dtype that there is."""
    import torch

    return torch.float16 if half else None


def run_part_script(part: str, output_file: str) -> None:
    """Be the script that writes one part of a model with our names: "unet", "lda" or "clip_text_encoder".

    output_file: its default.
    """

    def script(
        source: Annotated[
            str, typer.Option("--from", help="A folder in diffusers' layout, a single file, or owner/name on the hub.")
        ] = DEFAULT_MODEL,
        target: Annotated[Path, typer.Option("--output-file", help="The file to write.")] = Path(output_file),
        half: Half = False,
        debug: Debug = False,
    ) -> None:
        with reported_errors(debug):
            from refiners.cli.sources import check_is_model
            from refiners.foundationals.latent_diffusion.files.convert import convert_part

            check_is_model(source)
            count = convert_part(source, part, target, as_dtype(half))
            typer.echo(f"wrote {target}: {count} tensors of {source}{' in float16' if half else ''}")

    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command(help=f"Write the {part} of Stable Diffusion 1 with the names of refiners.")(script)
    app()
