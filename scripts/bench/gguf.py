"""Times passes over a GGUF file and over the same model in safetensors, in turns.

    python -m scripts.bench.gguf --gguf FILE --model DIR --data rows.jsonl [--rounds 7] [--max-length 256]

Two passes are timed: an evaluation, and one exact step of a fresh adapter. Both models compute in the dtype of their
configuration. The ratio of a round is that of two neighbors in time, so that a busy machine counts for both.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from onelayer.compiler import evaluate_model, polish_adapter
from scripts.bench.options import parser_of

Pass = Callable[[Path], object]


def main() -> None:
    """Time the passes, print medians and the ratios of neighbors."""
    arguments = _arguments()
    print(f"{'pass':10}{'safetensors':>14}{'gguf':>10}{'ratio':>9}{'from':>8}{'to':>8}")
    for name, run in passes(arguments).items():
        seconds = in_turns(run, arguments.model, arguments.gguf, arguments.rounds)
        ratios = sorted(packed / plain for plain, packed in seconds)
        plain, packed = (median(column) for column in zip(*seconds, strict=True))
        shown = f"{median(ratios):9.3f}{ratios[0]:8.3f}{ratios[-1]:8.3f}"
        print(f"{name:10}{plain:12.3f} s{packed:8.3f} s{shown}", flush=True)


def passes(arguments: argparse.Namespace) -> dict[str, Pass]:
    """Return what is timed, by name; each takes a model."""

    def evaluate(model: Path) -> object:
        return evaluate_model(model, arguments.data, max_length=arguments.max_length, batch_size=arguments.batch_size)

    def step(model: Path) -> object:
        with tempfile.TemporaryDirectory() as name:
            return polish_adapter(
                None,
                model=model,
                data=arguments.data,
                output=Path(name) / "adapter",
                lora_rank=8,
                steps=1,
                batch_size=arguments.batch_size,
                max_length=arguments.max_length,
            )

    return {"evaluate": evaluate, "step": step}


def in_turns(run: Pass, first: Path, second: Path, rounds: int) -> list[tuple[float, float]]:
    """Return the seconds of both models in every round; which goes first alternates, and one round warms up."""
    found = []
    for number in range(rounds + 1):
        taken = {}
        for model in (first, second) if number % 2 else (second, first):
            started = time.perf_counter()
            run(model)
            taken[model] = time.perf_counter() - started
        found.append((taken[first], taken[second]))
    return found[1:]


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, rounds=7, batch_size=8, max_length=256)
    parser.add_argument("--gguf", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--model", type=Path, required=True, help="directory of the same model in safetensors")
    parser.add_argument("--data", type=Path, required=True, help="rows to compute")
    return parser.parse_args()


if __name__ == "__main__":
    main()
