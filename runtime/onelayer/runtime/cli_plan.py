"""The command `onelayer plan`: checked options in, one call of `plan_run`, its result on stdout."""

from pathlib import Path
from typing import Annotated

import typer

from onelayer.runtime.cli_format import print_result
from onelayer.runtime.cli_format_plan import plan_summary
from onelayer.runtime.cli_options import FactorDtype, Json, MaxLength, Memory


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
    from onelayer.runtime.plan import plan_run

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
