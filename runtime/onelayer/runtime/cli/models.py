"""The commands that only look, `evaluate` and `inspect`: checked options in, one call of the API each."""

from pathlib import Path
from typing import Annotated

import typer

from onelayer.runtime.cli.command import print_result
from onelayer.runtime.cli.options import (
    Adapters,
    Against,
    BatchSize,
    Data,
    Device,
    FactorDtype,
    Json,
    MaxLength,
    Memory,
    Plot,
)
from onelayer.runtime.reporting import summaries
from onelayer.runtime.reporting.run_summaries import plan_summary


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

    Prints loss, perplexity and accuracy, of a sequence classifier over texts instead of tokens; everything shares one
    pass over the layers.

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
        summaries.evaluate_summary,
        as_json,
    )


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

    print_result(lambda: inspect_path(path, plot), summaries.inspect_summary, as_json)


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model directory or Hub id; a config.json alone will do.")
    ],
    memory_bytes: Memory,
    max_length: MaxLength = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per training step and device.")] = 8,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 8,
    factor_dtype: FactorDtype = None,
    emulator: Annotated[
        Path | None, typer.Option(metavar="DIR", help="An emulator of MODEL; its spectra say what each choice loses.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what fits in a memory budget, before any weight is read.

    The best emulator that can be trained, how its factors and activations are stored,
    predicted peaks and rough durations.

    \b
    Example:
      onelayer plan ./llama-8b --memory 16GiB
      onelayer plan ./llama-70b --memory 24GiB --max-length 1024 --batch-size 4 --json
    """
    from onelayer.runtime.planning.plan import plan_run

    print_result(
        lambda: plan_run(
            model,
            memory_bytes,
            max_length=max_length,
            batch_size=batch_size,
            lora_rank=lora_rank,
            factor_dtype=factor_dtype,
            emulator=emulator,
        ),
        plan_summary,
        as_json,
    )
