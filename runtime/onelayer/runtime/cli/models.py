"""The read-only commands: `evaluate`, `inspect` and `plan`. Each makes one call of the API."""

from pathlib import Path
from typing import Annotated, TypedDict, Unpack

import typer
from pydantic import Field, PositiveInt

from onelayer.compiler.compile.settings import CompileSettings, Form
from onelayer.compiler.evaluate.settings import EvaluateKeywords, EvaluateSettings
from onelayer.compiler.factors.stored_forms import FactorDtype
from onelayer.runtime.cli.command import print_result
from onelayer.runtime.cli.options import (
    Adapters,
    Against,
    Data,
    HostMemoryToPlan,
    Json,
    Memory,
    Plot,
    reads_data,
    settings_options,
)
from onelayer.runtime.generation.settings import GenerateKeywords, GenerateSettings
from onelayer.runtime.reporting import summaries
from onelayer.runtime.reporting.run_summaries import plan_summary
from onelayer.runtime.training.settings import TrainSettings


class PlannedTraining(TrainSettings):
    """The settings of a training, with the help that `plan` shows."""

    batch_size: Annotated[PositiveInt, Field(description="Examples per training step and device.")] = (
        TrainSettings.default("batch_size")
    )


class PlanKeywords(TypedDict, total=False):
    """The training and compile settings that `plan` takes."""

    max_length: int
    batch_size: int
    lora_rank: int
    max_steps: int | None
    factor_dtype: FactorDtype | None
    form: Form


@reads_data
@settings_options(EvaluateKeywords, EvaluateSettings, omit=("revision", "host_memory_bytes"))
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory or Hub id.")],
    data: Data,
    adapter: Adapters = None,
    against: Against = None,
    *,
    as_json: Json = False,
    **settings: Unpack[EvaluateKeywords],
) -> None:
    """Score MODEL, and MODEL with each adapter, layer by layer.

    Prints loss, perplexity and accuracy, for a sequence classifier over texts instead of tokens. All scores share one
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
            **settings,
        ),
        summaries.evaluate_summary,
        as_json,
    )


@settings_options(GenerateKeywords, GenerateSettings)
def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model directory, merged model, emulator directory or Hub id.")
    ],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to answer or to continue.")],
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="Adapter to try on MODEL.")] = None,
    *,
    as_json: Json = False,
    **settings: Unpack[GenerateKeywords],
) -> None:
    """Write text with MODEL, and with an adapter, to try the result of a training.

    The model is loaded as a whole, over all devices and the host's memory.

    \b
    Example:
      onelayer generate ./llama-8b --adapter corrected --prompt "Name three cities."
      onelayer generate emulator --adapter adapter --prompt "Name three cities." --temperature 0.7
    """
    from onelayer.runtime import generate_text

    print_result(
        lambda: generate_text(model, prompt, adapter, **settings),
        lambda document: str(document["text"]),
        as_json,
    )


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Emulator, adapter, artifact or checkpoint.")],
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Describe what a directory holds and where it came from.

    \b
    Example:
      onelayer inspect emulator
    """
    from onelayer.compiler import inspect_path

    print_result(lambda: inspect_path(path, plot), summaries.inspect_summary, as_json)


@settings_options(PlanKeywords, PlannedTraining, CompileSettings)
def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model directory or Hub id; a config.json alone is enough.")
    ],
    memory_bytes: Memory,
    *,
    emulator: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="An emulator of MODEL; its spectra predict what each choice loses."),
    ] = None,
    images: Annotated[int, typer.Option(help="Images or recordings in an example; each tile of an image counts.")] = 1,
    image_side: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", help="Side of an image; by default what the model is made for, else 448."),
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(help="Time for a training of --max-steps; chooses how often anchors are renewed."),
    ] = None,
    host_memory_bytes: HostMemoryToPlan = None,
    as_json: Json = False,
    **settings: Unpack[PlanKeywords],
) -> None:
    """Show what fits in a memory budget, before any weight is read.

    Prints the best emulator that can be trained, how its factors and activations are stored, predicted peaks and rough
    durations; and which way of training is the fastest: on the original, in memory or streamed, or on an emulator.

        \b
        Example:
          onelayer plan ./llama-8b --memory 16GiB
          onelayer plan ./llama-8b --memory 16GiB --max-steps 500 --hours 2
          onelayer plan ./llama-70b --memory 24GiB --max-length 1024 --batch-size 4 --json
    """
    from onelayer.runtime.planning.plan import plan_run

    print_result(
        lambda: plan_run(
            model,
            memory_bytes,
            images=images,
            image_side=image_side,
            emulator=emulator,
            hours=hours,
            host_memory_bytes=host_memory_bytes,
            **settings,
        ),
        plan_summary,
        as_json,
    )
