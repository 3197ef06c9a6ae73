"""Measures how much of direct LoRA's gain reaches the original: every method and stage, on a given trained model.

    python -m scripts.quality.cells --name perl --model DIR --train train.jsonl --held-out test.jsonl --work DIR

For every seed the script trains LoRA on the original itself and on every emulator (kind:size, see
scripts/quality/emulators.py). Adapters are scored on their emulator and on the original: uncorrected, corrected as
published (limit 3), corrected as chosen on held-out data, and after exact steps (`polish`). The first --validation-rows
rows of the held-out data choose, the next --test-rows rows score. Each result is appended to DIR/results.jsonl.
Recorded results are not made again, so an interrupted run can resume and several runs may share the work.
`scripts.quality.tables` makes tables and a picture from the file.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from peft import PeftModel
from torch.nn.functional import cross_entropy

from onelayer.compiler import correct_adapter, evaluate_model, polish_adapter
from onelayer.compiler.data.classes import predicted_classes
from onelayer.compiler.data.tokens import IGNORED, load_tokenizer
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.evaluate.samples import Samples
from onelayer.runtime import load_emulator, train_lora
from scripts.quality.emulators import (
    COMPILED,
    REFINED,
    compiled,
    derived,
    dropped,
    elastic,
    refined,
    resident,
    restored,
)


class Bench:
    """The work for one model and task: returns what exists and makes what is missing."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.given = arguments
        self.work: Path = arguments.work / arguments.name
        self.work.mkdir(parents=True, exist_ok=True)
        self.model: Path = arguments.model.absolute()
        self.validation, self.test = self._split()
        self.calibration = {"samples": 64, "max_length": arguments.max_length, "batch_size": 8}

    def _split(self) -> tuple[Path, Path]:
        first, second = self.given.validation_rows, self.given.test_rows
        lines = self.given.held_out.read_text().splitlines(keepends=True)[: first + second]
        paths = self.work / "validation.jsonl", self.work / "test.jsonl"
        for path, part in zip(paths, (lines[:first][: self.given.choose_rows], lines[first:]), strict=True):
            path.write_text("".join(part))
        return paths

    def made(self, name: str, make: Callable[[Path], Any]) -> Path:
        """Return the directory of that name, made if missing; its `figures.json` holds the result of making it."""
        path = self.work / name
        with FileLock(self.work / f".{name}.lock"):
            if not path.exists():
                print(f"{self.given.name}: making {name}", flush=True)
                figures = make(path)
                if figures is not None:
                    (self.work / f"{name}.figures.json").write_text(json.dumps(figures))
        return path

    def figures(self, name: str) -> Any:
        """Return the result of making `name`."""
        return json.loads((self.work / f"{name}.figures.json").read_text())

    def emulator(self, kind: str, size: float) -> Path:
        """Return the emulator of one kind and size."""
        name, given = f"{kind}-{size}", (self.model, self.given.train, self.calibration)
        if kind.endswith(REFINED):
            emulator = self.emulator(kind.removesuffix(REFINED), size)
            return self.made(name, lambda path: refined(path, emulator, *given))
        if kind == "dropped":
            return self.made(name, lambda path: dropped(size, path, self.model))
        if kind in COMPILED:
            return self.made(name, lambda path: compiled(kind, size, path, *given))
        published = self.emulator("published", size)
        return self.made(name, lambda path: derived(kind, path, published, *given))

    def trained(self, name: str, model: Path, seed: int, **more: Any) -> Path:
        """Train LoRA on an emulator or on the original."""
        given = self.given

        def make(path: Path) -> dict[str, Any]:
            result = train_lora(
                model, given.train, path, lora_rank=8, lora_alpha=16, max_steps=given.steps, seed=seed,
                batch_size=given.batch_size, max_length=given.max_length, learning_rate=given.learning_rate,
                lora={"modules_to_save": []}, **more,  # a classifier's head stays unchanged, as in exact steps
            )  # fmt: skip
            return {"step_seconds": result.seconds / result.steps, "train_peak_bytes": result.peak_device_bytes}

        return self.made(f"{name}-lora-{seed}", make)

    def corrected(self, adapter: Path, emulator: Path, auto: bool) -> Path:
        """Correct the adapter as published, or as chosen on held-out data."""
        how: dict[str, Any] = {"limit": 3.0}
        if auto:
            how = {"limit": "auto", "data": str(self.validation), "max_length": self.given.max_length, "batch_size": 8}

        def make(path: Path) -> dict[str, Any]:
            result = correct_adapter(adapter, emulator=emulator, model=self.model, output=path, **how)
            return {"limit": result.limit, "solver": result.solver, "scale": result.scale}

        return self.made(f"{adapter.name}-{'chosen' if auto else 'limit3'}", make)

    def polished(self, name: str, start: Path | None, steps: int, seed: int) -> Path:
        """Run exact steps from an adapter, or from none."""
        given = self.given
        fresh: dict[str, Any] = {"lora_rank": 8, "lora_alpha": 16.0} if start is None else {}
        rate = given.polish_rate if start is not None else given.scratch_rate
        return self.made(
            f"{name}-polished-{steps}",
            lambda path: {
                "seconds": polish_adapter(
                    start, model=self.model, data=str(given.train), output=path, steps=steps, micro_batch_size=8,
                    batch_size=given.polish_batch, max_length=given.max_length, learning_rate=rate, seed=seed, **fresh,
                ).report.seconds
            },
        )  # fmt: skip

    def score(self, adapters: Iterable[Path], data: Path) -> list[tuple[float, float]]:
        """Score loss and accuracy of the original without and with each adapter, in one stream."""
        scored = evaluate_model(
            self.model, str(data), adapters=list(adapters), max_length=self.given.max_length, batch_size=8
        )
        return [(result.loss, result.token_accuracy) for result in scored.results]

    def record(self, rows: list[dict[str, Any]], **common: Any) -> None:
        """Append lines to the results."""
        with FileLock(self.work / ".results.lock"), open(self.given.work / "results.jsonl", "a") as file:
            for row in rows:
                file.write(json.dumps({"task": self.given.name, **common, **row}) + "\n")
                print(json.dumps({"task": self.given.name, **common, **row}), flush=True)

    def recorded(self, **wanted: Any) -> bool:
        """Return whether such a line is recorded already."""
        path = self.given.work / "results.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return any({"task": self.given.name, **wanted}.items() <= json.loads(line).items() for line in lines)

    def direct(self, seed: int) -> None:
        """Record the original, and LoRA on it."""
        if self.recorded(seed=seed, row="direct"):
            return
        adapter = self.trained("direct", self.model, seed)
        (before, accuracy), (after, reached) = self.score([adapter], self.test)
        figures = self.figures(adapter.name)
        self.record(
            [
                {"row": "original", "loss": before, "accuracy": accuracy},
                {"row": "direct", "loss": after, "accuracy": reached, **figures},
            ],
            kind="direct", size=1.0, seed=seed,
        )  # fmt: skip

    def cell(self, kind: str, size: float, seed: int) -> None:
        """Record every stage of one emulator except polish.

        `kind+sublayer` trains with compressed activations, `kind+elastic` on a random prefix of the factors at every
        step.
        """
        if self.recorded(kind=kind, size=size, seed=seed):
            return
        base, _, way = kind.partition("+")
        emulator = self.emulator(base, size)
        more: dict[str, Any] = {"activations": way, "activation_rank": 0.125} if way in ("layer", "sublayer") else {}
        with elastic(seed=seed) if way == "elastic" else nullcontext():
            adapter = self.trained(f"{kind}-{size}", emulator, seed, **more)
        common = {
            "kind": kind,
            "size": size,
            "seed": seed,
            "bytes": _layer_bytes(emulator),
            **self.figures(adapter.name),
        }
        if kind == "dropped":
            places = {int(small): number for small, number in self.figures(emulator.name).items()}
            whole = self.made(f"{adapter.name}-restored", lambda path: restored(adapter, path, places, self.model))
            self.record([_row("uncorrected", self.score([whole], self.test)[1])], **common)
            return
        rows = [_row("emulator", self.resident_score(emulator, None))]
        rows.append(_row("on the emulator", self.resident_score(emulator, adapter)))
        stages = {"uncorrected": adapter, "limit 3": self.corrected(adapter, emulator, auto=False)}
        stages["chosen"] = self.corrected(adapter, emulator, auto=True)
        found = self.score(stages.values(), self.test)[1:]
        rows += [_row(name, score) for name, score in zip(stages, found, strict=True)]
        rows[-1] |= self.figures(stages["chosen"].name)
        self.record(rows, **common)

    def polish(self, kind: str, size: float, seed: int) -> None:
        """Record exact steps from the chosen correction and from the uncorrected adapter; for `scratch`, from none."""
        if self.recorded(kind=kind, size=size, seed=seed, polished=True):
            return
        starts: dict[str, Path | None] = {"exact steps alone": None}
        if kind != "scratch":
            adapter = self.trained(f"{kind}-{size}", self.emulator(kind, size), seed)
            starts = {"uncorrected": adapter, "chosen": self.corrected(adapter, self.emulator(kind, size), auto=True)}
        stages = {
            f"{name} + {steps}": self.polished(f"scratch-{seed}" if start is None else start.name, start, steps, seed)
            for name, start in starts.items()
            for steps in self.given.polish_steps
        }
        found = self.score(stages.values(), self.test)[1:]
        rows = [_row(name, score) for name, score in zip(stages, found, strict=True)]
        self.record(rows, kind=kind, size=size, seed=seed, polished=True)

    @torch.no_grad()
    def resident_score(self, emulator: Path, adapter: Path | None) -> tuple[float, float]:
        """Score loss and accuracy of the emulator itself on the test rows."""
        model: Any = load_emulator(emulator)
        classes = predicted_classes(type(model), model.config, emulator)
        samples = Samples.read(self.test, load_tokenizer(self.model), self.given.max_length, classes)
        model = (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()
        lost, hits, count = 0.0, 0, 0
        for batch in samples.batches(model.config, 1):
            counted = batch.targets != IGNORED
            logits, labels = model(**batch.inputs).logits[counted].float(), batch.targets[counted]
            lost += float(cross_entropy(logits, labels, reduction="sum"))
            hits += int((logits.argmax(-1) == labels).sum())
            count += len(labels)
        return lost / count, hits / count


def _row(name: str, score: tuple[float, float]) -> dict[str, Any]:
    return {"row": name, "loss": score[0], "accuracy": score[1]}


def _layer_bytes(path: Path) -> int:
    """Count bytes of the weights of the repeated layers' linears, at 16 bits if they are not quantized."""
    if (path / "emulator.json").exists():
        source = Emulator.open(path)
        sizes = {name: entry.size_bytes for name, entry in source.checkpoint.tensors.items() if ".lr_" in name}
        return sum(sizes.values())
    linears = [part for part in resident(path).modules() if isinstance(part, torch.nn.ModuleList)]
    return 2 * sum(part.weight.numel() for part in linears[0].modules() if isinstance(part, torch.nn.Linear))


def main() -> None:
    """Make the requested cells."""
    arguments = _arguments()
    bench = Bench(arguments)
    for seed in arguments.seeds:
        bench.direct(seed)
        for kind, size in arguments.emulators:
            bench.cell(kind, size, seed)
        for kind, size in arguments.polish:
            bench.polish(kind, size, seed)


def _kind_and_size(text: str) -> tuple[str, float]:
    kind, _, size = text.partition(":")
    return kind, float(size or 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the task in the results")
    parser.add_argument("--model", type=Path, required=True, help="directory of a trained model")
    parser.add_argument("--train", type=Path, required=True, help="training data, also used for calibration")
    parser.add_argument(
        "--held-out", type=Path, required=True, help="rows that choose the correction, then rows that score"
    )
    parser.add_argument("--work", type=Path, required=True, help="directory for all outputs")
    parser.add_argument(
        "--emulators", type=_kind_and_size, nargs="*", default=[], help="for example published:0.25 nf4:0.12"
    )
    parser.add_argument(
        "--polish", type=_kind_and_size, nargs="*", default=[], help="for example published:0.25 scratch"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--validation-rows", type=int, default=60)
    parser.add_argument(
        "--choose-rows", type=int, help="use only this many validation rows; the test rows stay the same"
    )
    parser.add_argument("--test-rows", type=int, default=150)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--polish-steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--polish-batch", type=int, default=32)
    parser.add_argument("--polish-rate", type=float, default=5e-3)
    parser.add_argument("--scratch-rate", type=float, default=1.2e-2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
