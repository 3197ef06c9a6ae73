"""Times every way to train on a checkpoint that the page cache does not hold, next to what the planner predicts.

    python -m scripts.bench.ways [--gigabytes 8] [--rows 2] [--tokens 128] [--every 10 4] [--directory DIR]

The checkpoint and the factors of its emulator are random. Plain training, anchored training and exact steps see the
same rows a step; the system's cache is emptied of the checkpoint all the time. Exits with 1 if a step differs from its
prediction by more than is wanted.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers

from onelayer.compiler import polish_adapter
from onelayer.runtime import TrainResult, train_lora
from onelayer.runtime.planning.read_shapes import read_shapes
from onelayer.runtime.planning.speed import measured_speed, seconds_at
from onelayer.runtime.planning.train_memory import PlannedRun
from onelayer.runtime.planning.ways import anchor_seconds
from scripts.bench.files import Shape, write_emulator
from scripts.bench.memory import WIDE, WIDTH, make_checkpoint
from scripts.bench.options import parser_of
from scripts.bench.streamed import uncached

RATIO, RANK = 0.12, 8
# Two trainings, whose difference is without what every training takes once.
STEPS = 2, 8
MOST_DIFFERENCE = 0.2


def predicted(model: Path, given: argparse.Namespace) -> dict[str, float]:
    """Predict the seconds of a step by way, as `plan` does."""
    shapes = read_shapes(model).at_length(given.tokens)
    run = PlannedRun(given.rows, given.tokens, RANK, on_gpu=False)
    speed = measured_speed(model, shapes, run.tokens)
    assert speed is not None
    print(speed.model_dump_json())
    seconds = seconds_at(speed, shapes, run, ratio=RATIO, samples=1, polish_batch=given.rows)
    anchors = {every: anchor_seconds(shapes, RATIO, run, speed, every) for every in given.every}
    anchored = {f"anchored every {every}": seconds.train_step + added for every, added in anchors.items()}
    return {"plain": seconds.train_step, **anchored, "exact": seconds.polish_step}


def measured(model: Path, work: Path, given: argparse.Namespace) -> dict[str, float]:
    """Train each way; return the seconds of a step, without those of starting and ending."""
    shape = Shape(hidden=WIDTH, inner=WIDE, layers=len(list(model.glob("model-0*.safetensors"))))
    emulator, data = work / "emulator", model.parent / "data.jsonl"
    write_emulator(emulator, model, shape, RATIO)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (emulator / file).write_bytes((model / file).read_bytes())
    rows: dict[str, Any] = {"batch_size": given.rows, "max_length": given.tokens, "lora_rank": RANK}

    def trained(steps: int, **anchors: Any) -> TrainResult:
        return train_lora(emulator, data, work / f"{steps} {len(anchors)}", max_steps=steps, **anchors, **rows)

    few, many = STEPS
    plain = (trained(many).seconds - trained(few).seconds) / (many - few)
    found = {"plain": plain}
    for every in given.every:
        report = trained(every, model=model, anchor_every=every).anchors
        assert report is not None
        found[f"anchored every {every}"] = plain + report.seconds / every
    exact = polish_adapter(
        None, model=model, data=data, output=work / "exact", steps=1, micro_batch_size=given.rows, **rows
    )
    return {**found, "exact": exact.report.seconds}


def main() -> int:
    """Make the files, time each way, print the table."""
    parser = parser_of(__doc__, gigabytes=8.0, rows=2, tokens=128)
    parser.add_argument("--every", type=int, nargs="+", default=[10, 4], help="steps between renewals")
    parser.add_argument("--directory", type=Path, help="directory of the files; default: a temporary one")
    given = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=given.directory) as name:
        model = make_checkpoint(Path(name), given.gigabytes)
        expected = predicted(model, given)
        with uncached(model):
            found = measured(model, Path(name), given)
    print(f"{given.rows} x {given.tokens} tokens a step; seconds of a step: measured, predicted, ratio")
    ratios = {way: seconds / expected[way] for way, seconds in found.items()}
    for way, seconds in found.items():
        print(f"{way:18}{seconds:8.1f}{expected[way]:8.1f}{ratios[way]:8.2f}")
    return int(any(abs(ratio - 1) > MOST_DIFFERENCE for ratio in ratios.values()))


if __name__ == "__main__":
    sys.exit(main())
