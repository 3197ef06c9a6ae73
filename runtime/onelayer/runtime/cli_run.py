"""The command `onelayer run`: a manifest in, its steps brought up to date, or with --dry-run foretold."""

from pathlib import Path
from typing import Annotated

import typer

from onelayer.runtime import cli_format_run
from onelayer.runtime.cli_format import print_error, print_result
from onelayer.runtime.cli_options import Json


def run(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="YAML file; see manifests/README.md.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run, and why.")] = False,
    task: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this task; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Do what a manifest asks for and is not done yet.

    Results are kept in $ONELAYER_HOME (default ~/.cache/onelayer) and never made twice; report.html shows them.

    \b
    Example:
      onelayer run manifests/demo.yaml --dry-run
      onelayer run manifests/demo.yaml --task sql
    """
    from onelayer.runtime import pipeline
    from onelayer.runtime.manifest import load_manifest

    loaded = load_manifest(manifest)
    if dry_run:
        print_result(lambda: pipeline.plan(loaded, tasks=task), cli_format_run.plan_steps_summary, as_json)
        return
    result = print_result(
        lambda: pipeline.run(loaded, tasks=task, notify=lambda text: typer.echo(text, err=True)),
        cli_format_run.run_summary,
        as_json,
    )
    for step in result.failed:
        print_error(f"{step.name}: {step.reason}")
    if result.failed:
        raise typer.Exit(1)
