"""The `onelayer` command, assembled from its commands; each calls the Python API once.

The commands decide nothing. What they call is imported when they run, so that help and dry runs are quick.
"""

from typing import Annotated

import typer

from onelayer.runtime.cli.adapters import correct, merge, polish, train
from onelayer.runtime.cli.emulators import compile_, refine, slice_
from onelayer.runtime.cli.images import encode, sample
from onelayer.runtime.cli.models import evaluate, generate, inspect, plan
from onelayer.runtime.cli.runs import app as artifacts_app
from onelayer.runtime.cli.runs import run
from onelayer.runtime.version import installed_version

app = typer.Typer(
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune a transformer that does not fit your GPU: compile an emulator, train LoRA on it, correct the LoRA.",
)
app.add_typer(artifacts_app, name="artifacts")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"onelayer {installed_version()}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(plan)
app.command()(encode)
app.command("compile")(compile_)
app.command()(refine)
app.command("slice")(slice_)
app.command()(train)
app.command()(correct)
app.command()(polish)
app.command()(merge)
app.command()(evaluate)
app.command()(sample)
app.command()(generate)
app.command()(inspect)
app.command()(run)
