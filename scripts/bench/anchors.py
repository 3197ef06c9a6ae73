"""Measures what anchors cost, in pairs on the same model and rows, in processor seconds.

    python -m scripts.bench.anchors --model DIR [--emulator DIR] [--rows 8] [--tokens 96] [--pairs 3]

Anchoring is compared with a bare streamed forward of the original to its last layer plus one of the emulator over the
same rows, and a training step of four of the rows with offsets with one without. Without `--emulator` one of codes at
0.145 of the bytes is compiled first, on random tokens. Exits with 1 if a median ratio is above what is wanted.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch

from onelayer.compiler import compile_emulator
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.streaming.stream import Stream
from onelayer.runtime.anchors.anchors import Anchors, evaluating
from onelayer.runtime.modules.low_rank_linear import load_emulator
from scripts.bench.options import parser_of

CPU = torch.device("cpu")
STEP_ROWS, RANK = 4, 8
# Wanted: anchoring compared with both forwards, and a step with offsets compared with one without.
MOST = {"anchoring": 1.15, "step": 1.05}


def timed(work: Callable[[], Any]) -> float:
    """Run `work` once; return its processor seconds, those of reading threads included."""
    started = time.process_time()
    work()
    return time.process_time() - started


class Pairs:
    """The emulator with an adapter, its anchors, its original without one, and batches of one row each."""

    def __init__(self, directory: Path, emulator: Path, given: argparse.Namespace, meter: Meter) -> None:
        config = peft.LoraConfig(r=RANK, target_modules="all-linear")
        self.adapted: Any = peft.get_peft_model(load_emulator(emulator), config).train()
        facts = Emulator.open(emulator).facts
        self.anchors = Anchors(self.adapted, facts, directory, given.bits, meter, nullcontext)
        self.streamed, self.meter = StreamedModel(directory), meter
        ids = random_ids(self.adapted.config.vocab_size, given.rows, given.tokens)
        self.batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids.split(STEP_ROWS)]

    def renew(self) -> None:
        """Find the offsets of all rows."""
        self.anchors.renew(self.batches)

    def forwards(self) -> None:
        """Stream the original without the adapter to its last layer, then run the emulator without its head."""
        last = max(unit.position for unit in self.streamed.units if unit.is_block)
        stream = Stream(self.streamed, CPU, self.meter, stop_after=last)
        stream.run([{**batch, "use_cache": False} for batch in self.batches], lambda index, output: None)
        with torch.no_grad(), evaluating(self.adapted):
            for batch in self.batches:
                self.adapted.get_base_model().base_model(**batch, use_cache=False)

    def step(self) -> None:
        """Run forward and backward of a batch."""
        batch = self.batches[0]
        self.adapted(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        self.adapted.zero_grad()

    def anchored_step(self) -> None:
        """Run a step with the offsets of the batch."""
        with self.anchors.next_batch():
            self.step()


def random_ids(vocabulary: int, rows: int, tokens: int) -> torch.Tensor:
    """Make rows of random tokens, the same in every run."""
    return torch.randint(3, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))


@contextmanager
def emulator_of(given: argparse.Namespace) -> Iterator[Path]:
    """Return the emulator that was given, or compile one."""
    if given.emulator is not None:
        yield given.emulator
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"text": " ".join(f"{number * position % 997}" for position in range(64))} for number in range(1, 9)]
        (Path(folder) / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings: dict[str, Any] = {"keep_bytes": 0.145, "form": "coded", "backward": False, "max_length": 64}
        compile_emulator(given.model, Path(folder) / "rows.jsonl", Path(folder) / "emulator", **settings)
        yield Path(folder) / "emulator"


def main() -> int:
    """Take turns; print every pair and the median ratios."""
    given = _arguments()
    found: dict[str, list[float]] = {name: [] for name in MOST}
    with emulator_of(given) as emulator, Meter(CPU) as meter:
        pairs = Pairs(given.model, emulator, given, meter)
        for number in range(given.pairs + 1):  # the first warms up
            bare, renewed = timed(pairs.forwards), timed(pairs.renew)
            works = [pairs.step, pairs.anchored_step]
            seconds = {work: timed(work) for work in (works if number % 2 else works[::-1])}
            plain, anchored = (seconds[work] for work in works)
            while not pairs.anchors.is_used_up:
                pairs.anchors.next_batch()
            print(
                f"{number or 'warm':4} both forwards {bare:.2f} s, anchoring {renewed:.2f} s ({renewed / bare:.3f}); "
                f"step {plain:.2f} s, with offsets {anchored:.2f} s ({anchored / plain:.3f})",
                flush=True,
            )
            if number:
                found["anchoring"].append(renewed / bare)
                found["step"].append(anchored / plain)
    for name, ratios in found.items():
        print(f"{name}: {median(ratios):.3f} times ({min(ratios):.3f} to {max(ratios):.3f}), wanted {MOST[name]}")
    return int(any(median(ratios) > MOST[name] for name, ratios in found.items()))


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, rows=8, tokens=96, bits=2, pairs=3)
    parser.add_argument("--model", type=Path, required=True, help="directory of a causal model")
    parser.add_argument("--emulator", type=Path, help="an emulator of it")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
