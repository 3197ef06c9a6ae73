"""The command `onelayer run`, which brings a manifest's steps up to date, and `onelayer artifacts` for the store."""

from pathlib import Path
from typing import Annotated

import typer

from onelayer.runtime.cli.command import print_error, print_result
from onelayer.runtime.cli.options import Json, MaxSize
from onelayer.runtime.reporting import run_summaries, summaries


def run(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="YAML file; see manifests/README.md.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would run, and why.")] = False,
    task: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this task; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Run the steps of a manifest that are not done yet.

    Results are kept in $ONELAYER_HOME (default ~/.cache/onelayer) and never made twice; report.html shows them.

    \b
    Example:
      onelayer run manifests/demo.yaml --dry-run
      onelayer run manifests/demo.yaml --task sql
    """
    from onelayer.runtime.manifest.manifest import load_manifest

    loaded = load_manifest(manifest)
    if dry_run:
        from onelayer.runtime.pipeline.plan import plan

        print_result(lambda: plan(loaded, tasks=task), run_summaries.plan_steps_summary, as_json)
        return
    from onelayer.runtime.pipeline.kinds import product_kinds
    from onelayer.runtime.pipeline.run import run

    result = print_result(
        lambda: run(loaded, tasks=task, notify=lambda text: typer.echo(text, err=True)),
        lambda document: run_summaries.run_summary(document, product_kinds()),
        as_json,
    )
    for step in result.failed:
        print_error(f"{step.name}: {step.reason}")
    if result.failed:
        raise typer.Exit(1)


app = typer.Typer(rich_markup_mode=None, help="List, verify and prune what `onelayer run` keeps.")


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List every finished artifact with its size, its age and the manifests that used it last, oldest first."""
    from onelayer.runtime.pipeline.housekeeping import list_artifacts
    from onelayer.runtime.store.store import ArtifactStore

    print_result(lambda: list_artifacts(ArtifactStore()), summaries.artifacts, as_json)


@app.command("verify")
def verify(as_json: Json = False) -> None:
    """List every file that changed since it was written."""
    from onelayer.runtime.store.store import ArtifactStore

    store = ArtifactStore()
    faults = print_result(
        lambda: [fault.model_dump(mode="json") for fault in store.verify()], summaries.faults, as_json
    )
    if faults:
        raise typer.Exit(1)


@app.command("prune")
def prune(
    older_than_days: Annotated[
        float | None,
        typer.Option(min=0, metavar="DAYS", help="Remove artifacts that were not used for this many days."),
    ] = None,
    max_size: MaxSize = None,
    keep: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="MANIFEST",
            help="Remove all artifacts that this manifest does not use; may be repeated to keep those of several.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove artifacts by age, size, or what manifests use.

    An artifact that a run is making or using right now always stays.

    \b
    Example:
      onelayer artifacts prune --keep manifests/demo.yaml --dry-run
      onelayer artifacts prune --older-than-days 30 --max-size 200GiB
    """
    from onelayer.runtime.pipeline.housekeeping import prune_by_rules

    print_result(
        lambda: prune_by_rules(older_than_days, max_size, keep or [], dry_run=dry_run), summaries.pruned, as_json
    )
