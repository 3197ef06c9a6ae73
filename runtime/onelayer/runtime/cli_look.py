"""The commands that only look, `evaluate` and `inspect`: checked options in, one call of the API each."""

from pathlib import Path
from typing import Annotated

import typer

from onelayer.runtime import cli_format
from onelayer.runtime.cli_format import print_result
from onelayer.runtime.cli_options import (
    Adapters,
    Against,
    BatchSize,
    Data,
    Device,
    Json,
    MaxLength,
    Plot,
)


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
        cli_format.evaluate_summary,
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

    print_result(lambda: inspect_path(path, plot), cli_format.inspect_summary, as_json)
