"""The adapter commands: `train`, `correct`, `polish` and `merge`. Each makes one call of the API."""

from pathlib import Path
from typing import Annotated, Unpack

import typer

from onelayer.compiler.correct.settings import CorrectKeywords, CorrectSettings
from onelayer.compiler.polish.settings import PolishKeywords, PolishSettings
from onelayer.runtime.cli.command import print_result
from onelayer.runtime.cli.options import (
    Data,
    HeldOut,
    Json,
    Output,
    Weights,
    reads_data,
    settings_options,
)
from onelayer.runtime.reporting import summaries
from onelayer.runtime.reporting.tables import summary
from onelayer.runtime.training.settings import TrainKeywords, TrainSettings

Start = Annotated[
    Path | None,
    typer.Argument(
        metavar="ADAPTER",
        help="Adapter to start from, corrected or not; leave it out to start a fresh one with --lora-rank.",
    ),
]
EvalData = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DATA",
        help="Held-out data: its loss is shown, and the best adapter is written; may be repeated.",
    ),
]

ScoredData = Annotated[
    list[str] | None,
    typer.Option(metavar="DATA", help="Held-out data whose loss is shown while training; may be repeated."),
]


@reads_data
@settings_options(PolishKeywords, PolishSettings, omit=("revision",), after={"eval_data": "max_length"})
def polish(
    model: Annotated[str, typer.Option(help="The original: model directory or Hub id.")],
    data: Data,
    output: Output,
    adapter: Start = None,
    *,
    eval_data: EvalData = None,
    as_json: Json = False,
    **settings: Unpack[PolishKeywords],
) -> None:
    """Improve ADAPTER by a few exact steps on the original.

    The model streams forward and back with one layer in memory, and the adapter is updated once per large batch.
    Without ADAPTER this is LoRA fine-tuning of a model of any size.

    \b
    Example:
      onelayer polish corrected --model ./llama-8b --data train.jsonl --steps 10 --output polished
      onelayer polish --lora-rank 8 --model ./llama-8b --data train.jsonl --steps 50 --output adapter
    """
    from onelayer.compiler import polish_adapter

    print_result(
        lambda: polish_adapter(adapter, model=model, data=data, output=output, eval_data=eval_data or None, **settings),
        summaries.polish_summary,
        as_json,
    )


@reads_data
@settings_options(CorrectKeywords, CorrectSettings, omit=("max_length", "batch_size", "device", "host_memory_bytes"))
def correct(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter trained on the emulator.")],
    emulator: Annotated[Path, typer.Option(help="The emulator it was trained on.")],
    model: Annotated[str, typer.Option(help="The original: model directory or Hub id.")],
    output: Output,
    *,
    data: HeldOut = None,
    as_json: Json = False,
    **settings: Unpack[CorrectKeywords],
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
        lambda: correct_adapter(adapter, emulator=emulator, model=model, output=output, data=data or None, **settings),
        summaries.correct_summary,
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

    The weights are read and written one tensor at a time. An interrupted merge resumes where it stopped.

    \b
    Example:
      onelayer merge corrected --model ./llama-8b --output merged
      onelayer merge sql support --weight 0.7 --weight 0.3 --model ./llama-8b --output merged
    """
    from onelayer.compiler import merge_adapter

    print_result(lambda: merge_adapter(adapter, model=model, output=output, weight=weight), summary, as_json)


@reads_data
@settings_options(
    TrainKeywords, TrainSettings, omit=("lora", "args"), after={"eval_data": "dropout", "model": "activation_report"}
)
def train(
    emulator: Annotated[Path, typer.Argument(metavar="EMULATOR", help="Emulator (or any model) directory.")],
    data: Data,
    output: Output,
    *,
    eval_data: ScoredData = None,
    model: Annotated[
        str | None, typer.Option(help="The original, for --anchor-every, dpo and kto: directory or Hub id.")
    ] = None,
    as_json: Json = False,
    **settings: Unpack[TrainKeywords],
) -> None:
    """Train a LoRA adapter on EMULATOR.

    PEFT and TRL do the training; `onelayer correct` then fits the adapter to the original. A sequence classifier learns
    from rows of text and label, its head included.

    \b
    Example:
      onelayer train emulator --data train.jsonl --max-steps 500 --output adapter
      onelayer train emulator --data train.jsonl --activations sublayer --activation-rank auto --output adapter
      onelayer train emulator --model ./llama-8b --anchor-every 10 --data train.jsonl --output adapter
      onelayer train emulator --model ./llama-8b --method dpo --data preferences.jsonl --output adapter
      onelayer train emulator --data dog --sample-prompt "sks dog on the moon" --sample-steps 28 --output adapter
    """
    from onelayer.runtime import train_lora

    print_result(
        lambda: train_lora(emulator, data, output, model=model, eval_data=eval_data or None, **settings),
        summaries.train_summary,
        as_json,
    )
