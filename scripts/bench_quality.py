"""How much of direct LoRA's gain reaches the original: every stage of the method, on a trained model given by the user.

    python scripts/bench_quality.py --model DIR --train train.jsonl --test test.jsonl --validation dev.jsonl --work DIR

One row for each thing that can be handed out: the adapter as it was trained on the emulator, corrected as published
(limit 3), corrected with the choice made on validation data, and polished by exact steps from each start; beside them
LoRA trained on the original itself. Everything lies in --work and is not made twice, so that a run can be taken up.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from onelayer.compiler import compile_emulator, correct_adapter, evaluate_model, polish_adapter
from onelayer.runtime import train_lora


class Bench:
    """One model, one domain: paths of what was made, made where they are missing."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.work: Path = arguments.work

    def made(self, name: str, make: Callable[[Path], Any]) -> Path:
        """The directory of that name, made if it is not there."""
        path = self.work / name
        if not path.exists():
            print(f"making {name}", flush=True)
            make(path)
        return path

    def emulator(self, ratio: float) -> Path:
        """An emulator of `ratio`, by the allocation and dtype of the command line."""
        given = self.arguments
        settings = {"samples": 64, "max_length": given.max_length, "batch_size": 8, "factor_dtype": given.factor_dtype}
        return self.made(
            f"emulator-{ratio}",
            lambda path: compile_emulator(
                given.model, given.train, path, ratio=ratio, rank_allocation=given.rank_allocation, **settings
            ),
        )

    def trained(self, name: str, model: Path, seed: int) -> Path:
        """LoRA on an emulator or on the original."""
        given = self.arguments
        return self.made(
            f"{name}-{seed}",
            lambda path: train_lora(
                model, given.train, path, lora_rank=8, lora_alpha=16, max_steps=given.steps, batch_size=8,
                max_length=given.max_length, learning_rate=given.learning_rate, seed=seed,
            ),
        )  # fmt: skip

    def polished(self, name: str, start: Path | None, steps: int, seed: int) -> Path:
        """Exact steps from an adapter, or from none."""
        given = self.arguments
        fresh: dict[str, Any] = {"lora_rank": 8, "lora_alpha": 16.0} if start is None else {}
        rate = given.polish_rate if start is not None else given.scratch_rate
        return self.made(
            f"{name}-polished-{steps}-{seed}",
            lambda path: polish_adapter(
                start, model=given.model, data=given.train, output=path, steps=steps, batch_size=given.polish_batch,
                micro_batch_size=8, max_length=given.max_length, learning_rate=rate, seed=seed, **fresh,
            ),
        )  # fmt: skip

    def rows(self, ratio: float, seed: int) -> Iterator[tuple[str, Path]]:
        """Name and adapter of every row of one cell."""
        given = self.arguments
        emulator = self.emulator(ratio)
        uncorrected = self.trained(f"lora-{ratio}", emulator, seed)
        pair: dict[str, Any] = {"emulator": emulator, "model": given.model}
        published = self.made(
            f"published-{ratio}-{seed}", lambda path: correct_adapter(uncorrected, output=path, limit=3.0, **pair)
        )
        chosen = self.made(
            f"chosen-{ratio}-{seed}",
            lambda path: correct_adapter(
                uncorrected, output=path, limit="auto", data=given.validation, max_length=given.max_length,
                batch_size=8, **pair,
            ),
        )  # fmt: skip
        yield "direct LoRA", self.trained("direct", given.model, seed)
        yield "uncorrected", uncorrected
        yield "corrected, as published", published
        yield "corrected, chosen", chosen
        for steps in given.polish_steps:
            yield f"chosen + {steps} exact steps", self.polished(f"chosen-{ratio}", chosen, steps, seed)
            yield f"uncorrected + {steps} exact steps", self.polished(f"lora-{ratio}", uncorrected, steps, seed)
            yield f"{steps} exact steps alone", self.polished("scratch", None, steps, seed)

    def cell(self, ratio: float, seed: int) -> list[dict[str, Any]]:
        """The scores of one cell, in one stream of the original."""
        rows = list(self.rows(ratio, seed))
        scored = evaluate_model(
            self.arguments.model,
            self.arguments.test,
            adapters=[path for _, path in rows],
            max_length=self.arguments.max_length,
            batch_size=8,
        )
        original, *found = scored.results
        direct = found[0].loss
        return [
            {
                "ratio": ratio,
                "seed": seed,
                "row": name,
                "loss": result.loss,
                "accuracy": result.token_accuracy,
                "share": (original.loss - result.loss) / (original.loss - direct),
                "original": original.loss,
            }
            for (name, _), result in zip(rows, found, strict=True)
        ]


def main() -> None:
    """Make, score, print one table; with --json write the figures."""
    arguments = _arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments)
    rows = [row for seed in arguments.seeds for ratio in arguments.ratios for row in bench.cell(ratio, seed)]
    print(f"\noriginal without tuning: loss {rows[0]['original']:.4f}; seeds {arguments.seeds}")
    print(f"{'ratio':>6} {'':32}{'loss':>9}{'accuracy':>10}{'share of the direct gain':>26}")
    for ratio, name in dict.fromkeys((row["ratio"], row["row"]) for row in rows):
        own = [row for row in rows if (row["ratio"], row["row"]) == (ratio, name)]
        shares = [row["share"] for row in own]
        spread = f" +- {stdev(shares):.1%}" if len(shares) > 1 else ""
        loss, accuracy = mean(row["loss"] for row in own), mean(row["accuracy"] for row in own)
        print(f"{ratio:6} {name:32}{loss:9.4f}{accuracy:10.4f}{f'{mean(shares):.1%}{spread}':>26}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of a trained causal model")
    parser.add_argument("--train", required=True, help="training data, which calibrates too")
    parser.add_argument("--validation", required=True, help="held-out data to choose the correction by")
    parser.add_argument("--test", required=True, help="other held-out data, for the scores")
    parser.add_argument("--work", type=Path, required=True, help="directory for everything that is made")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25, 0.12])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rank-allocation", default="uniform", choices=["uniform", "spectrum"])
    parser.add_argument("--factor-dtype", choices=["bf16", "int8", "nf4"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--max-length", type=int, default=224)
    parser.add_argument("--polish-steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--polish-batch", type=int, default=32)
    parser.add_argument("--polish-rate", type=float, default=5e-3)
    parser.add_argument("--scratch-rate", type=float, default=1.2e-2)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
