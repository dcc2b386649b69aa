"""The command `refiners` and its subcommands. Nothing heavy is imported before a subcommand runs."""

import typer

from refiners.cli.convert import convert
from refiners.cli.demo import demo
from refiners.cli.generate import generate
from refiners.cli.inspect import inspect
from refiners.cli.lora import app as lora
from refiners.cli.train import train

app = typer.Typer(
    help="Make pictures with Stable Diffusion and adapters, train adapters, convert files, and look into them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(convert)
app.command()(inspect)
app.command()(train)
app.command()(demo)
app.add_typer(lora, name="lora")


def main() -> None:
    """Run the command that the process's arguments name."""
    app(prog_name="refiners")
