"""The command `onelayer polish`: checked options in, one call of `polish_adapter`, its result on stdout."""

from pathlib import Path
from typing import Annotated, Any

import typer

from onelayer.runtime.cli.command import print_result
from onelayer.runtime.cli.options import (
    ActivationRank,
    ActivationReport,
    Activations,
    BatchSize,
    Data,
    Device,
    Epochs,
    HeldOut,
    HostMemory,
    Json,
    LearningRate,
    Limit,
    MaxLength,
    MaxSteps,
    Output,
    Resume,
    Seed,
    TargetModules,
    Weights,
    parse_target_modules,
    rank_parser,
)
from onelayer.runtime.reporting import summaries
from onelayer.runtime.reporting.tables import summary

Start = Annotated[
    Path | None, typer.Argument(metavar="ADAPTER", help="Adapter to start from, corrected or not; none: --lora-rank.")
]
KeptInputs = Annotated[
    Any,  # int | float | "exact"
    typer.Option(
        parser=rank_parser("exact"),
        metavar="exact|K|SHARE",
        help="How layer inputs are kept between passes: as they are, or as factors of that rank and 2 bits a value.",
    ),
]
Packing = Annotated[
    bool,
    typer.Option(
        "--packing/--no-packing", help="Put short examples into one row of --max-length; same gradients, fewer calls."
    ),
]
FreshTargets = Annotated[
    str | None,
    typer.Option(
        parser=parse_target_modules,
        metavar="NAMES",
        help="Without ADAPTER: `all-linear`, names separated by commas, or a regular expression.",
        show_default="all-linear",
    ),
]
EvalData = Annotated[
    str | None, typer.Option(metavar="DATA", help="Held-out data: its loss is shown, and the best adapter is written.")
]


def polish(
    model: Annotated[str, typer.Option(help="The original: model directory or Hub id.")],
    data: Data,
    output: Output,
    adapter: Start = None,
    steps: Annotated[int, typer.Option(min=1, help="Exact steps; each reads the model twice.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per step.")] = 64,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Examples computed at once.")] = 1,
    learning_rate: LearningRate = 1e-3,
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps over which the learning rate rises.")] = 0,
    max_gradient_norm: Annotated[float, typer.Option(help="Longer gradients are shortened to this; inf: none.")] = 1.0,
    max_length: MaxLength = 512,
    eval_data: EvalData = None,
    eval_steps: Annotated[int, typer.Option(min=1, help="Steps between two looks at --eval-data.")] = 1,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Without ADAPTER: rank of a fresh one.")] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Without ADAPTER: scaled by alpha / rank; 1 if left out.")
    ] = None,
    target_modules: FreshTargets = None,
    activations: KeptInputs = "exact",
    packing: Packing = False,
    device: Device = None,
    host_memory_bytes: HostMemory = None,
    seed: Seed = 0,
    resume: Resume = True,
    as_json: Json = False,
) -> None:
    """Improve ADAPTER by a few exact steps on the original.

    The model streams by forward and back, one layer in memory, and the adapter moves once for a large batch. Without
    ADAPTER this is LoRA fine-tuning of a model that fits nowhere.

    \b
    Example:
      onelayer polish corrected --model ./llama-8b --data train.jsonl --steps 10 --output polished
      onelayer polish --lora-rank 8 --model ./llama-8b --data train.jsonl --steps 50 --output adapter
    """
    from onelayer.compiler import polish_adapter

    pace = {"steps": steps, "batch_size": batch_size, "micro_batch_size": micro_batch_size, "max_length": max_length}
    motion = {"learning_rate": learning_rate, "warmup_steps": warmup_steps, "max_gradient_norm": max_gradient_norm}
    fresh = {"lora_rank": lora_rank, "lora_alpha": lora_alpha, "target_modules": target_modules}
    held_out = {"eval_data": eval_data, "eval_steps": eval_steps}
    place = {"device": device, "host_memory_bytes": host_memory_bytes, "activations": activations, "packing": packing}
    settings: dict[str, Any] = {**pace, **motion, **fresh, **held_out, **place, "seed": seed, "resume": resume}
    print_result(
        lambda: polish_adapter(adapter, model=model, data=data, output=output, **settings),
        summaries.polish_summary,
        as_json,
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

    The weights are read and written one tensor at a time. A merge that was stopped goes on where it was.

    \b
    Example:
      onelayer merge corrected --model ./llama-8b --output merged
      onelayer merge sql support --weight 0.7 --weight 0.3 --model ./llama-8b --output merged
    """
    from onelayer.compiler import merge_adapter

    print_result(lambda: merge_adapter(adapter, model=model, output=output, weight=weight), summary, as_json)


def train(
    emulator: Annotated[Path, typer.Argument(metavar="EMULATOR", help="Emulator (or any model) directory.")],
    data: Data,
    output: Output,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 8,
    lora_alpha: Annotated[int, typer.Option(min=1, help="The adapter is scaled by alpha / rank.")] = 8,
    target_modules: TargetModules = "all-linear",
    learning_rate: LearningRate = 2e-4,
    max_steps: MaxSteps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = 8,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Batches per optimizer step.")] = 1,
    max_length: MaxLength = 512,
    seed: Seed = 0,
    activations: Activations = "none",
    activation_rank: ActivationRank = 0.125,
    activation_report: ActivationReport = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
    as_json: Json = False,
) -> None:
    """Train a LoRA adapter on EMULATOR.

    PEFT and TRL do the training; `onelayer correct` then fits the adapter to the original. A sequence classifier learns
    from rows of text and label, its head included.

    \b
    Example:
      onelayer train emulator --data train.jsonl --max-steps 500 --output adapter
      onelayer train emulator --data train.jsonl --activations sublayer --activation-rank auto --output adapter
    """
    from onelayer.runtime import train_lora

    print_result(
        lambda: train_lora(
            emulator,
            data,
            output,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            target_modules=target_modules,
            learning_rate=learning_rate,
            max_steps=max_steps,
            epochs=epochs,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            max_length=max_length,
            seed=seed,
            activations=activations,
            activation_rank=activation_rank,
            activation_report=activation_report,
            resume=resume,
        ),
        summary,
        as_json,
    )
