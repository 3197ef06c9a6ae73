"""The commands that make emulators, `compile`, `refine` and `slice`: checked options in, one call of the API each."""

from pathlib import Path
from typing import Annotated

import typer

from onelayer.compiler.errors import InputError
from onelayer.runtime.cli.command import print_result
from onelayer.runtime.cli.options import (
    BatchSize,
    Calibration,
    CompileMemory,
    CompileRatio,
    Device,
    FactorDtype,
    HostMemory,
    Json,
    KeepBytes,
    MaxLength,
    Output,
    RankAllocation,
    Ratio,
    Resume,
    Seed,
    Solver,
)
from onelayer.runtime.reporting import summaries
from onelayer.runtime.reporting.tables import summary


def compile_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory or Hub id.")],
    calibration: Calibration,
    output: Output,
    ratio: CompileRatio = None,
    keep_bytes: KeepBytes = None,
    memory_bytes: CompileMemory = None,
    factor_dtype: FactorDtype = None,
    samples: Annotated[int, typer.Option(min=1, help="How many calibration examples to use.")] = 64,
    max_length: MaxLength = 512,
    batch_size: BatchSize = 1,
    solver: Solver = "exact",
    rank_allocation: RankAllocation = None,
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
      onelayer compile ./llama-8b --calibration mix.jsonl --keep-bytes 0.15 --output emulator
      onelayer compile ./llama-8b --calibration mix.jsonl --memory 16GiB --output emulator
      onelayer compile ./llama-8b --calibration mix.jsonl --ratio 0.25 --output emulator     as in the EMLoC paper
    """
    from onelayer.compiler import compile_emulator

    if memory_bytes is not None:
        from onelayer.runtime.planning.plan import size_for

        if ratio is not None or keep_bytes is not None:
            raise InputError("--memory: chooses the ratio; leave --ratio and --keep-bytes out")
        rank_allocation = rank_allocation or "spectrum"
        tokens = batch_size * max_length
        ratio, factor_dtype = size_for(model, memory_bytes, factor_dtype, rank_allocation, compile_tokens=tokens)
    print_result(
        lambda: compile_emulator(
            model,
            calibration,
            output,
            ratio=ratio,
            keep_bytes=keep_bytes,
            factor_dtype=factor_dtype,
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
        summaries.compile_summary,
        as_json,
    )


def refine(
    emulator: Annotated[Path, typer.Argument(metavar="EMULATOR", help="Emulator directory.")],
    model: Annotated[str, typer.Option(help="The original: model directory or Hub id.")],
    calibration: Calibration,
    output: Output,
    steps: Annotated[int, typer.Option(min=1, help="Training steps for each layer.")] = 100,
    step_samples: Annotated[int, typer.Option(min=1, help="Calibration examples per step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="First learning rate, as a share of a factor's size.")] = 0.01,
    samples: Annotated[int, typer.Option(min=1, help="How many calibration examples to use.")] = 256,
    max_length: MaxLength = 512,
    batch_size: BatchSize = 1,
    device: Device = None,
    host_memory_bytes: HostMemory = None,
    seed: Seed = 0,
    resume: Resume = True,
    as_json: Json = False,
) -> None:
    """Train the factors of EMULATOR against the original, layer by layer.

    Its layers then give more nearly what the original's give, at the same bytes, and more of what is learnt on it
    reaches the original. Only one layer of the original is in memory at a time.

    \b
    Example:
      onelayer refine emulator --model ./llama-8b --calibration mix.jsonl --output refined
    """
    from onelayer.compiler import refine_emulator

    print_result(
        lambda: refine_emulator(
            emulator,
            model=model,
            calibration=calibration,
            output=output,
            steps=steps,
            step_samples=step_samples,
            learning_rate=learning_rate,
            samples=samples,
            max_length=max_length,
            batch_size=batch_size,
            device=device,
            host_memory_bytes=host_memory_bytes,
            seed=seed,
            resume=resume,
        ),
        summaries.refine_summary,
        as_json,
    )


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

    print_result(lambda: slice_emulator(emulator, ratio=ratio, output=output), summary, as_json)
