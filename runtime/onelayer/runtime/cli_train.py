"""The command `onelayer train`: checked options in, one call of `train_lora`, its result on stdout."""

from pathlib import Path
from typing import Annotated

import typer

from onelayer.runtime import cli_format
from onelayer.runtime.cli_format import print_result
from onelayer.runtime.cli_options import (
    ActivationRank,
    ActivationReport,
    Activations,
    BatchSize,
    Data,
    Epochs,
    Json,
    LearningRate,
    MaxLength,
    MaxSteps,
    Output,
    Seed,
    TargetModules,
)


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
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Batches per optimiser step.")] = 1,
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
        cli_format.summary,
        as_json,
    )
