"""Makes what a cell of the quality tables needs, once: emulators, adapters and their corrections, scores, results.

Everything is kept in the work directory under its own name. What exists is returned, what is missing is made.
"""

import argparse
import json
import re
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
from scripts.quality.emulators import COMPILED, compiled, derived, dropped, elastic, refined, refinement_of, resident

Score = tuple[float, float]


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
        if ending := refinement_of(kind):
            emulator = self.emulator(kind.removesuffix(ending), size)
            return self.made(name, lambda path: refined(kind, path, emulator, *given))
        if kind == "dropped":
            return self.made(name, lambda path: dropped(size, path, self.model))
        if kind in COMPILED:
            return self.made(name, lambda path: compiled(kind, size, path, *given))
        published = self.emulator("published", size)
        return self.made(name, lambda path: derived(kind, path, published, *given))

    def direct(self, seed: int) -> Path:
        """Train LoRA on the original itself."""
        return self._trained("direct", self.model, seed)

    def trained(self, kind: str, size: float, seed: int) -> Path:
        """Train LoRA on an emulator, in the way that `kind` names after a plus (see `scripts.quality.cells`)."""
        base, _, way = kind.partition("+")
        more: dict[str, Any] = {}
        if way in ("layer", "sublayer"):
            more = {"activations": way, "activation_rank": 0.125}
        elif anchored := re.fullmatch(r"anchor(\d+)", way):
            more = {"anchor_every": int(anchored[1])}
        elif way not in ("", "elastic"):
            raise ValueError(f"{kind}: +{way} is no way to train; use +layer, +sublayer, +elastic or +anchorK")
        with elastic(seed=seed) if way == "elastic" else nullcontext():
            return self._trained(f"{kind}-{size}", self.emulator(base, size), seed, **more)

    def _trained(self, name: str, start: Path, seed: int, **more: Any) -> Path:
        given = self.given
        original = self.model if "anchor_every" in more else None

        def make(path: Path) -> dict[str, Any]:
            result = train_lora(
                start, given.train, path, model=original, lora_rank=8, lora_alpha=16, max_steps=given.steps, seed=seed,
                batch_size=given.batch_size, max_length=given.max_length, learning_rate=given.learning_rate,
                lora={"modules_to_save": []}, **more,  # a classifier's head stays unchanged, as in exact steps
            )  # fmt: skip
            seconds = 0.0 if result.anchors is None else result.anchors.seconds
            return {
                "step_seconds": (result.seconds - seconds) / result.steps,
                "train_peak_bytes": result.peak_device_bytes,
                **({} if result.anchors is None else {"anchor_seconds": seconds}),
            }

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

    def score(self, adapters: Iterable[Path], data: Path) -> list[Score]:
        """Score loss and accuracy of the original without and with each adapter, in one stream."""
        scored = evaluate_model(
            self.model, str(data), adapters=list(adapters), max_length=self.given.max_length, batch_size=8
        )
        return [(result.loss, result.token_accuracy or 0.0) for result in scored.results]

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

    @torch.no_grad()
    def resident_score(self, emulator: Path, adapter: Path | None) -> Score:
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


def layer_bytes(path: Path) -> int:
    """Count bytes of the weights of the repeated layers' linears, at 16 bits if they are not quantized."""
    if (path / "emulator.json").exists():
        source = Emulator.open(path)
        sizes = {name: entry.size_bytes for name, entry in source.checkpoint.tensors.items() if ".lr_" in name}
        return sum(sizes.values())
    linears = [part for part in resident(path).modules() if isinstance(part, torch.nn.ModuleList)]
    return 2 * sum(part.weight.numel() for part in linears[0].modules() if isinstance(part, torch.nn.Linear))
