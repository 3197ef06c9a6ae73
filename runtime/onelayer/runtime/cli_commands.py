"""The commands of `onelayer`: checked arguments in, one call of the Python API each, its result on stdout.

Nothing is decided here, and torch is imported only by the commands that compute.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from onelayer.runtime import cli_format
from onelayer.runtime.cli_artifacts import app as artifacts_app
from onelayer.runtime.cli_format import print_error, print_result
from onelayer.runtime.cli_options import (
    Adapters,
    Against,
    BatchSize,
    Calibration,
    Data,
    Device,
    HeldOut,
    HostMemory,
    Json,
    Limit,
    MaxLength,
    Output,
    Plot,
    RankAllocation,
    Ratio,
    Resume,
    Seed,
    Solver,
    Weights,
)
from onelayer.runtime.cli_train import train

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Fine-tune a transformer that does not fit your GPU: compile an emulator, train LoRA on it, correct the LoRA.",
)
app.add_typer(artifacts_app, name="artifacts")


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"onelayer {version('onelayer')}")
        except PackageNotFoundError:
            typer.echo("onelayer, run from a folder without being installed")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command("compile")
def compile_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory or Hub id.")],
    calibration: Calibration,
    output: Output,
    ratio: Ratio = 0.25,
    samples: Annotated[int, typer.Option(min=1, help="How many calibration examples to use.")] = 64,
    max_length: MaxLength = 512,
    batch_size: BatchSize = 1,
    solver: Solver = "exact",
    rank_allocation: RankAllocation = "uniform",
    device: Device = None,
    host_memory_bytes: HostMemory = None,
    seed: Seed = 0,
    resume: Resume = True,
    as_json: Json = False,
) -> None:
    """Write a compact emulator of MODEL, layer by layer.

    The emulator keeps a low-rank version of every linear; only one layer of MODEL is in memory at a time.

    \b
    Example:
      onelayer compile ./llama-8b --calibration mix.jsonl --ratio 0.25 --output emulator
    """
    from onelayer.compiler import compile_emulator

    print_result(
        lambda: compile_emulator(
            model,
            calibration,
            output,
            ratio=ratio,
            samples=samples,
            max_length=max_length,
            batch_size=batch_size,
            solver=solver,
            rank_allocation=rank_allocation,
            device=device,
            host_memory_bytes=host_memory_bytes,
            seed=seed,
            resume=resume,
        ),
        cli_format.compile_summary,
        as_json,
    )


@app.command("slice")
def slice_(
    emulator: Annotated[Path, typer.Argument(metavar="EMULATOR", help="Emulator directory.")],
    ratio: Ratio,
    output: Output,
    as_json: Json = False,
) -> None:
    """Cut a smaller emulator out of a larger one.

    The original model is not needed.

    \b
    Example:
      onelayer slice emulator --ratio 0.1 --output small-emulator
    """
    from onelayer.compiler import slice_emulator

    print_result(lambda: slice_emulator(emulator, ratio=ratio, output=output), cli_format.summary, as_json)


app.command()(train)


@app.command()
def correct(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter trained on the emulator.")],
    emulator: Annotated[Path, typer.Option(help="The emulator it was trained on.")],
    model: Annotated[str, typer.Option(help="The original: model directory or Hub id.")],
    output: Output,
    limit: Limit = 3.0,
    data: HeldOut = None,
    as_json: Json = False,
) -> None:
    """Fit an adapter trained on an emulator to the original.

    The result is a plain PEFT adapter of the original model.

    \b
    Example:
      onelayer correct adapter --emulator emulator --model ./llama-8b --output corrected
      onelayer correct adapter --emulator emulator --model ./llama-8b --limit auto --data dev.jsonl --output corrected
    """
    from onelayer.compiler import correct_adapter

    print_result(
        lambda: correct_adapter(adapter, emulator=emulator, model=model, output=output, limit=limit, data=data),
        cli_format.correct_summary,
        as_json,
    )


@app.command()
def merge(
    adapter: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="Corrected adapter; one or several.")],
    model: Annotated[str, typer.Option(help="The original: model directory or Hub id.")],
    output: Output,
    weight: Weights = None,
    as_json: Json = False,
) -> None:
    """Write the original model with adapters added to it.

    The weights are read and written one tensor at a time. A merge that was stopped goes on where it was.

    \b
    Example:
      onelayer merge corrected --model ./llama-8b --output merged
      onelayer merge sql support --weight 0.7 --weight 0.3 --model ./llama-8b --output merged
    """
    from onelayer.compiler import merge_adapter

    print_result(lambda: merge_adapter(adapter, model=model, output=output, weight=weight), cli_format.summary, as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory or Hub id.")],
    data: Data,
    adapter: Adapters = None,
    against: Against = None,
    max_length: MaxLength = 512,
    batch_size: BatchSize = 1,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Score MODEL, and MODEL with each adapter, layer by layer.

    Prints loss, perplexity and accuracy; everything shares one pass over the layers.

    \b
    Example:
      onelayer evaluate ./llama-8b --data test.jsonl --adapter corrected
      onelayer evaluate ./llama-8b --data test.jsonl --against emulator
    """
    from onelayer.compiler import evaluate_model

    print_result(
        lambda: evaluate_model(
            model,
            data,
            adapters=adapter or (),
            against=against,
            max_length=max_length,
            batch_size=batch_size,
            device=device,
        ),
        cli_format.evaluate_summary,
        as_json,
    )


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Emulator, adapter, artifact or checkpoint.")],
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Say what a directory holds and where it came from.

    \b
    Example:
      onelayer inspect emulator
    """
    from onelayer.compiler import inspect_path

    print_result(lambda: inspect_path(path, plot), cli_format.inspect_summary, as_json)


@app.command()
def run(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="YAML file; see manifests/README.md.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run, and why.")] = False,
    task: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this task; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Do what a manifest asks for and is not done yet.

    Results are kept in $ONELAYER_HOME (default ~/.cache/onelayer) and never made twice.

    \b
    Example:
      onelayer run manifests/demo.yaml --dry-run
      onelayer run manifests/demo.yaml --task sql
    """
    from onelayer.runtime import pipeline
    from onelayer.runtime.manifest import load_manifest

    loaded = load_manifest(manifest)
    if dry_run:
        print_result(lambda: pipeline.plan(loaded, tasks=task), cli_format.run_summary, as_json)
        return
    result = print_result(
        lambda: pipeline.run(loaded, tasks=task, notify=lambda text: typer.echo(text, err=True)),
        cli_format.run_summary,
        as_json,
    )
    for step in result.failed:
        print_error(f"{step.name}: {step.reason}")
    if result.failed:
        raise typer.Exit(1)
