"""`refiners lora`: sums of LoRAs, smaller ranks, other kinds as LoRAs, and LoRAs of what two models differ by."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refiners.cli.convert import Half, as_dtype
from refiners.cli.errors import Debug, reported_errors

if TYPE_CHECKING:
    from refiners.foundationals.latent_diffusion import StableDiffusion
    from refiners.foundationals.latent_diffusion.lora import LoraLosses

app = typer.Typer(
    help="Sum LoRAs, change their ranks, turn other kinds into LoRAs, or extract LoRAs from models.",
    no_args_is_help=True,
)

Sources = Annotated[
    list[str], typer.Argument(metavar="IN[:WEIGHT]...", help="LoRAs, and their weights in the sum, 1 if not given.")
]
Source = Annotated[Path, typer.Argument(metavar="IN", help="A file of updates of any kind.")]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="The file or folder to write.")]
Tuned = Annotated[str, typer.Argument(metavar="TUNED", help="The model whose changes are wanted.")]
Base = Annotated[str, typer.Argument(metavar="BASE", help="The model that it was made from.")]
Rank = Annotated[int | None, typer.Option("--rank", min=1, help="The most that a layer may have.")]
Energy = Annotated[
    float | None,
    typer.Option("--energy", help="How much of each layer to keep, as 0.95 of the squares of the singular values."),
]
Form = Annotated[str, typer.Option("--to", metavar="FORMAT", help="kohya, diffusers or peft (a folder).")]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="The model that the files are for, if not a released one. DoRA, OFT and the like need one with its "
        "weights.",
    ),
]


@app.command()
def combine(
    sources: Sources,
    target: Target,
    rank: Rank = None,
    form: Form = "kohya",
    half: Half = False,
    model: ModelName = None,
    debug: Debug = False,
) -> None:
    """Write the weighted sum of LoRAs: with nothing lost, or at --rank the best there is."""
    with reported_errors(debug):
        from refiners.cli.settings import split_scale
        from refiners.foundationals.latent_diffusion.lora import combine_loras

        weights: dict[str, float] = {}
        for path, weight in map(split_scale, sources):
            weights[path] = weights.get(path, 0.0) + weight
        _report(combine_loras(weights, target, _model(model, next(iter(weights))), rank, form, as_dtype(half)))


@app.command()
def resize(
    source: Source,
    target: Target,
    rank: Rank = None,
    energy: Energy = None,
    form: Form = "kohya",
    half: Half = False,
    model: ModelName = None,
    debug: Debug = False,
) -> None:
    """Write a LoRA with smaller ranks, and say what is lost. Updates of other kinds stay as they are."""
    with reported_errors(debug):
        from refiners.foundationals.latent_diffusion.lora import resize_lora

        _report(resize_lora(source, target, _model(model, source), rank, energy, form, as_dtype(half)))


@app.command("to-lora")
def become_lora(
    source: Source,
    target: Target,
    rank: Rank = None,
    energy: Energy = None,
    form: Form = "kohya",
    half: Half = False,
    model: ModelName = None,
    debug: Debug = False,
) -> None:
    """Write updates of any kinds (LoKr, LoHa, DoRA, full differences …) as LoRAs, and say what is lost."""
    with reported_errors(debug):
        from refiners.foundationals.latent_diffusion.lora import to_lora

        _report(to_lora(source, target, _model(model, source), rank, energy, form, as_dtype(half)))


@app.command()
def extract(
    tuned: Tuned,
    base: Base,
    target: Target,
    rank: Rank = None,
    energy: Energy = None,
    is_complete: Annotated[
        bool,
        typer.Option("--complete/--only-lora", help="Whether changes of norms and biases are written as differences."),
    ] = True,
    form: Form = "kohya",
    half: Half = False,
    debug: Debug = False,
) -> None:
    """Write what one model has more than another as a LoRA, and say what is lost."""
    with reported_errors(debug):
        from refiners.foundationals.latent_diffusion.lora import extract_lora

        ours, theirs = _loaded(tuned), _loaded(base)
        _report(extract_lora(ours, theirs, target, rank, energy, is_complete, form, as_dtype(half)))


def _model(where: str | None, lora: Path | str) -> "StableDiffusion":
    """The named model with its weights, which are only mapped into memory; or the tree of the one that a LoRA is of."""
    from refiners.cli.sources import empty_model_for_lora

    return empty_model_for_lora(str(lora)) if where is None else _loaded(where)


def _loaded(where: str) -> "StableDiffusion":
    from refiners.cli.sources import check_is_model
    from refiners.foundationals.latent_diffusion import StableDiffusion

    check_is_model(where)
    return StableDiffusion.from_pretrained(where)


def _report(losses: "LoraLosses") -> None:
    typer.echo(f"wrote {losses}")
