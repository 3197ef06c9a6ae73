"""The command `onelayer polish`: checked options in, one call of `polish_adapter`, its result on stdout."""

from pathlib import Path
from typing import Annotated, Any

import typer

from onelayer.runtime import cli_format_polish
from onelayer.runtime.cli_format import print_result
from onelayer.runtime.cli_options import (
    Data,
    Device,
    HostMemory,
    Json,
    LearningRate,
    MaxLength,
    Output,
    Resume,
    Seed,
    parse_target_modules,
    rank_parser,
)

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
        cli_format_polish.polish_summary,
        as_json,
    )
