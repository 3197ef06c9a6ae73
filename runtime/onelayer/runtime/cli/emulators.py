"""The commands that make emulators: `compile`, `refine` and `slice`. Each makes one call of the API."""

from pathlib import Path
from typing import Annotated, Unpack

import typer

from onelayer.compiler.compile.settings import CompileKeywords, CompileSettings
from onelayer.compiler.errors import InputError
from onelayer.compiler.refine.settings import RefineKeywords, RefineSettings
from onelayer.runtime.cli.command import print_result
from onelayer.runtime.cli.options import (
    Calibration,
    CompileMemory,
    Json,
    Output,
    Ratio,
    reads_data,
    settings_options,
)
from onelayer.runtime.reporting import summaries
from onelayer.runtime.reporting.tables import summary


@reads_data
@settings_options(CompileKeywords, CompileSettings, omit=("revision",), after={"memory_bytes": "keep_bytes"})
def compile_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory or Hub id.")],
    calibration: Calibration,
    output: Output,
    *,
    memory_bytes: CompileMemory = None,
    as_json: Json = False,
    **settings: Unpack[CompileKeywords],
) -> None:
    """Write a compact emulator of MODEL, layer by layer.

    The emulator keeps a low-rank version of every linear; only one layer of MODEL is in memory at a time.

    \b
    Example:
      onelayer compile ./llama-8b --calibration mix.jsonl --keep-bytes 0.15 --output emulator
      onelayer compile ./llama-8b --calibration mix.jsonl --memory 16GiB --output emulator
      onelayer compile ./llama-8b --calibration mix.jsonl --ratio 0.25 --output emulator     as in the EMLoC paper
    """
    from onelayer.compiler import compile_emulator

    if memory_bytes is not None:
        from onelayer.runtime.planning.plan import size_for

        if settings["ratio"] is not None or settings["keep_bytes"] is not None:
            raise InputError("--memory: chooses the ratio; leave --ratio and --keep-bytes out")
        tokens = settings["batch_size"] * settings["max_length"]
        dtype, allocation, form = settings["factor_dtype"], settings["rank_allocation"], settings["form"]
        size = size_for(model, memory_bytes, dtype, allocation, form=form, compile_tokens=tokens)
        settings.update(size.compile_settings(allocation or "spectrum"))  # type: ignore[typeddict-item]
    print_result(
        lambda: compile_emulator(model, calibration, output, **settings),
        summaries.compile_summary,
        as_json,
    )


@reads_data
@settings_options(RefineKeywords, RefineSettings)
def refine(
    emulator: Annotated[Path, typer.Argument(metavar="EMULATOR", help="Emulator directory.")],
    model: Annotated[str, typer.Option(help="The original: model directory or Hub id.")],
    calibration: Calibration,
    output: Output,
    *,
    as_json: Json = False,
    **settings: Unpack[RefineKeywords],
) -> None:
    """Train the factors of EMULATOR against the original, layer by layer.

    Its layers then reproduce the original's more closely at the same size, so more of what is learned on it reaches the
    original. Only one layer of the original is in memory at a time.

    \b
    Example:
      onelayer refine emulator --model ./llama-8b --calibration mix.jsonl --output refined
    """
    from onelayer.compiler import refine_emulator

    print_result(
        lambda: refine_emulator(emulator, model=model, calibration=calibration, output=output, **settings),
        summaries.refine_summary,
        as_json,
    )


def slice_(
    emulator: Annotated[Path, typer.Argument(metavar="EMULATOR", help="Emulator directory.")],
    ratio: Ratio,
    output: Output,
    as_json: Json = False,
) -> None:
    """Slice a smaller emulator off a larger one.

    The original model is not needed.

    \b
    Example:
      onelayer slice emulator --ratio 0.1 --output small-emulator
    """
    from onelayer.compiler import slice_emulator

    print_result(lambda: slice_emulator(emulator, ratio=ratio, output=output), summary, as_json)
