"""The `onelayer artifacts` commands: what `onelayer run` keeps, listed, verified and pruned."""

from pathlib import Path
from typing import Annotated

import typer

from onelayer.runtime import cli_format
from onelayer.runtime.artifacts import ArtifactStore
from onelayer.runtime.cli_format import print_result
from onelayer.runtime.cli_options import Json, MaxSize
from onelayer.runtime.prune import prune_by_rules
from onelayer.runtime.reasons import listing

app = typer.Typer(rich_markup_mode=None, help="List, verify and prune what `onelayer run` keeps.")


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List every finished artifact with its size, its age and the manifests that used it last, oldest first."""
    print_result(lambda: listing(ArtifactStore()), cli_format.artifacts, as_json)


@app.command("verify")
def verify(as_json: Json = False) -> None:
    """Name every file that is not as it was written."""
    store = ArtifactStore()
    faults = print_result(
        lambda: [fault.model_dump(mode="json") for fault in store.verify()], cli_format.faults, as_json
    )
    if faults:
        raise typer.Exit(1)


@app.command("prune")
def prune(
    older_than_days: Annotated[
        float | None, typer.Option(min=0, metavar="DAYS", help="Remove what was not used for so long.")
    ] = None,
    max_size: MaxSize = None,
    keep: Annotated[
        list[Path] | None,
        typer.Option(metavar="MANIFEST", help="Remove all that no such manifest uses; may be repeated."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Remove artifacts by age, size, or what manifests use.

    One that a run is making or using right now always stays.

    \b
    Example:
      onelayer artifacts prune --keep manifests/demo.yaml --dry-run
      onelayer artifacts prune --older-than-days 30 --max-size 200GiB
    """
    print_result(
        lambda: prune_by_rules(older_than_days, max_size, keep or [], dry_run=dry_run), cli_format.pruned, as_json
    )
