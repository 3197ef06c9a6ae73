"""The options of the commands, each with its help and its parser: text in, checked values out."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from onelayer.runtime.sizes import parse_size


def parse_limit(text: str | float | None) -> float | str | None:
    """A number, None for "none", or one of two words."""
    if text is None or text == "none":
        return None
    if text in ("auto", "default"):
        return text
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor `none`, `auto` or `default`") from None


def parse_activations(text: str) -> str:
    """One of the three modes."""
    if text not in ("none", "layer", "sublayer"):
        raise typer.BadParameter(f"{text!r} is none of none, layer, sublayer")
    return text


def rank_parser(word: str) -> Callable[[str | float], int | float | str]:
    """Reads a whole number, a share below 1, or the one word that stands for neither."""

    def parse(text: str | float) -> int | float | str:
        if text == word or not isinstance(text, str):
            return text
        try:
            return int(text) if text.isdigit() else float(text)
        except ValueError:
            raise typer.BadParameter(
                f"{text!r} is neither a number of rows, nor a share like 0.125, nor `{word}`"
            ) from None

    return parse


def parse_target_modules(text: str) -> str | list[str]:
    """Plain names separated by commas become a list; anything else ("all-linear", a regular expression) stays."""
    names = text.split(",")
    return names if all(re.fullmatch(r"[\w.]+", name) for name in names) else text


def parse_bytes(text: str | int) -> int:
    """A size like 24GiB, 500MB or 1000 in bytes."""
    try:
        return parse_size(str(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Output = Annotated[Path, typer.Option(metavar="DIR", help="Directory to write; must not hold files yet.")]
Data = Annotated[
    str,
    typer.Option(
        metavar="DATA",
        help="A .jsonl, .txt or .parquet file, a directory, or a Hub id; rows for a classifier: text and label.",
    ),
]
Calibration = Annotated[
    list[str],
    typer.Option(metavar="DATA", help="Text like that of your tasks: file, directory or Hub id; may be repeated."),
]
Ratio = Annotated[float, typer.Option(help="Share of each linear's parameters that the emulator keeps, 0 to 1.")]
CompileRatio = Annotated[
    float | None,
    typer.Option(
        help="Share of each linear's parameters that the emulator keeps, 0 to 1.",
        show_default="by --keep-bytes",
    ),
]
KeepBytes = Annotated[
    float | None,
    typer.Option(help="In place of --ratio: the share of each linear's bytes at 16 bits, 0 to 1.", show_default="0.25"),
]
FactorDtype = Annotated[
    Literal["bf16", "int8", "nf4"] | None,
    typer.Option(
        help="How the emulator's factors are stored; nf4 holds 3.8 times the rank of bf16.",
        show_default="as MODEL is with --ratio, else the best for the bytes",
    ),
]
MaxLength = Annotated[int, typer.Option(min=2, metavar="TOKENS", help="Examples are cut at this many tokens.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples computed at once; more needs more memory.")]
Solver = Annotated[
    Literal["exact", "fast"], typer.Option(help="Exact eigenvectors, or a randomized sketch within a percent of them.")
]
RankAllocation = Annotated[
    Literal["uniform", "spectrum"] | None,
    typer.Option(
        help="The same ratio for every linear, or the same total where it buys most.",
        show_default="uniform with --ratio, else spectrum",
    ),
]
HostMemory = Annotated[
    int | None,
    typer.Option(
        "--host-memory",
        parser=parse_bytes,
        metavar="SIZE",
        help="Memory for the states of waiting examples, like 8GiB; the rest goes to disk. Default: half the free.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Take up an interrupted run with the same settings, or start anew.")
]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also draw an emulator's errors and spectra (.png, .svg or .pdf).")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default a GPU where there is one.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
LearningRate = Annotated[float, typer.Option(help="Learning rate; the default is meant for LoRA.")]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps; give this or --epochs.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data; give this or --max-steps.")]
Adapters = Annotated[list[Path] | None, typer.Option(metavar="DIR", help="Adapter to score too; may be repeated.")]
Limit = Annotated[
    Any,  # float | "auto" | None: typer takes no unions
    typer.Option(
        parser=parse_limit,
        metavar="NUMBER|none|auto|default",
        help="How far a correction may exceed the adapter; auto chooses that, the solver and a scale by the loss on "
        "--data.",
        show_default="auto with --data, else 3",
    ),
]
HeldOut = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="Held-out data to choose the correction by: a file, a directory or a Hub id."),
]
Weights = Annotated[
    list[float] | None,
    typer.Option(metavar="FACTOR", help="Factor of what an adapter adds, 1 if not given; one for each adapter."),
]
Against = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Emulator of MODEL: how far are its predictions from the original's?"),
]
Activations = Annotated[
    str,
    typer.Option(
        parser=parse_activations,
        metavar="none|layer|sublayer",
        help="Compress what is stored for backward: inputs of layers, or outputs of norms; the rest is recomputed.",
    ),
]
ActivationRank = Annotated[
    Any,  # int | float | "auto"
    typer.Option(
        parser=rank_parser("auto"),
        metavar="K|SHARE|auto",
        help="Rank of stored factors, or its share of the hidden size; auto measures. What they leave: 2 bits a value.",
    ),
]
ActivationReport = Annotated[
    bool, typer.Option("--activation-report", help="Measure errors and the gradient's cosine on the first batch.")
]
TargetModules = Annotated[
    str,
    typer.Option(
        parser=parse_target_modules,
        metavar="NAMES",
        help="`all-linear`, names separated by commas, or a regular expression.",
    ),
]
Memory = Annotated[
    int,
    typer.Option("--memory", parser=parse_bytes, metavar="SIZE", help="Memory of the device to plan for, like 24GiB."),
]
CompileMemory = Annotated[
    int | None,
    typer.Option(
        "--memory",
        parser=parse_bytes,
        metavar="SIZE",
        help="Instead of a ratio: the best ratio and factor dtype that can be trained on a device of this size.",
    ),
]
MaxSize = Annotated[
    int | None,
    typer.Option(parser=parse_bytes, metavar="SIZE", help="Remove the least recently used until this much is left."),
]
