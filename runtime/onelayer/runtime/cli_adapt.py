"""The commands that take a trained adapter, `correct` and `merge`: checked options in, one call of the API each."""

from pathlib import Path
from typing import Annotated

import typer

from onelayer.runtime import cli_format
from onelayer.runtime.cli_format import print_result
from onelayer.runtime.cli_options import (
    HeldOut,
    Json,
    Limit,
    Output,
    Weights,
)


def correct(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter trained on the emulator.")],
    emulator: Annotated[Path, typer.Option(help="The emulator it was trained on.")],
    model: Annotated[str, typer.Option(help="The original: model directory or Hub id.")],
    output: Output,
    limit: Limit = "default",
    data: HeldOut = None,
    as_json: Json = False,
) -> None:
    """Fit an adapter trained on an emulator to the original.

    The result is a plain PEFT adapter of the original model.

    \b
    Example:
      onelayer correct adapter --emulator emulator --model ./llama-8b --output corrected
      onelayer correct adapter --emulator emulator --model ./llama-8b --data dev.jsonl --output corrected
    """
    from onelayer.compiler import correct_adapter

    print_result(
        lambda: correct_adapter(adapter, emulator=emulator, model=model, output=output, limit=limit, data=data),
        cli_format.correct_summary,
        as_json,
    )


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
