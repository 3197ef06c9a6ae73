"""What an emulator of some bytes is good for, by factor dtype, on a trained model given by the user.

    python scripts/bench_quantised.py --model DIR --train train.jsonl --test test.jsonl

For every share of the linears' 16-bit bytes, dtype and seed: LoRA trained on the emulator, scored on the emulator and,
uncorrected and corrected, on the original; beside them LoRA trained on the original itself and on an emulator whose
linears are all quantised whole, which is QLoRA. `--steps-only` times one training step of every dtype at equal rank.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy

from onelayer.compiler import compile_emulator, correct_adapter, evaluate_model
from onelayer.compiler.examples import load_tokenizer, read_examples, tokenize
from onelayer.compiler.factor_dtypes import FactorDtype
from onelayer.runtime import load_emulator, train_lora

WHOLE = 0.99  # a share at which nf4 keeps every linear whole


def main() -> None:
    """Measure, print a line per run and a table of means; with --json write the figures."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.steps_only:
            _print_steps(arguments, Path(folder))
            return
        settings = [(size, dtype) for size in arguments.sizes for dtype in arguments.dtypes]
        settings += [(WHOLE, "nf4")] if arguments.whole else []
        emulators = [_compiled(arguments, Path(folder), size, dtype) for size, dtype in settings]
        rows = [row for seed in arguments.seeds for row in _seed(arguments, Path(folder), emulators, seed)]
    _print_table(rows)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows))


def _compiled(arguments: argparse.Namespace, folder: Path, size: float, dtype: FactorDtype) -> dict[str, Any]:
    path = folder / f"{dtype}-{size}"
    made = compile_emulator(
        arguments.model,
        arguments.train,
        path,
        keep_bytes=size,
        factor_dtype=dtype,
        samples=arguments.samples,
        max_length=arguments.max_length,
        batch_size=8,
        rank_allocation=arguments.rank_allocation,
    )
    whole = sum(item.form == "dense" for item in made.linears)
    error = mean(item.error for item in made.linears)
    rank = mean(item.rank for item in made.linears)
    figures = {"dtype": dtype, "keep_bytes": made.kept_bytes_share, "rank": rank, "whole": whole, "error": error}
    print(json.dumps(figures), flush=True)
    return {**figures, "path": path}


def _seed(
    arguments: argparse.Namespace, folder: Path, emulators: list[dict[str, Any]], seed: int
) -> list[dict[str, Any]]:
    """All adapters of one seed, and the original without any, scored in one streamed pass."""
    direct = folder / f"direct-{seed}"
    _train(arguments, arguments.model, direct, seed)
    rows, adapters = [], [direct]
    for item in emulators:
        trained, corrected = folder / f"{item['path'].name}-{seed}", folder / f"{item['path'].name}-{seed}-corrected"
        seconds = _train(arguments, item["path"], trained, seed)
        correct_adapter(trained, emulator=item["path"], model=arguments.model, output=corrected, limit=arguments.limit)
        adapters += [trained, corrected]
        before, after = _loss(arguments, item["path"], None), _loss(arguments, item["path"], trained)
        figures = {name: value for name, value in item.items() if name != "path"}
        rows.append({**figures, "seed": seed, "emulator": before, "on_emulator": after, "step_seconds": seconds})
        print(json.dumps(rows[-1]), flush=True)
    scored = evaluate_model(
        arguments.model, arguments.test, adapters=adapters, max_length=arguments.max_length, batch_size=8
    )
    original, best, *losses = [result.loss for result in scored.results]
    for row, uncorrected, corrected_loss in zip(rows, losses[::2], losses[1::2], strict=True):
        share = (original - corrected_loss) / (original - best)
        row |= {"original": original, "direct": best, "uncorrected": uncorrected, "corrected": corrected_loss}
        row["share"] = share
        print(json.dumps(row), flush=True)
    return rows


def _train(arguments: argparse.Namespace, model: Path, output: Path, seed: int) -> float:
    """One adapter; seconds per step, loading included."""
    result = train_lora(
        model,
        arguments.train,
        output,
        lora_rank=arguments.lora_rank,
        lora_alpha=2 * arguments.lora_rank,
        max_steps=arguments.steps,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        learning_rate=arguments.learning_rate,
        seed=seed,
    )
    return result.seconds / result.steps


def _loss(arguments: argparse.Namespace, emulator: Path, adapter: Path | None) -> float:
    """Held-out loss of the resident emulator, with or without an adapter."""
    model: Any = load_emulator(emulator)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    tokenizer = load_tokenizer(emulator)
    lost, count = 0.0, 0
    with torch.no_grad():
        for example in read_examples(arguments.test):
            ids = torch.tensor(tokenize(example, tokenizer, arguments.max_length).input_ids)
            logits = model(input_ids=ids[None]).logits[0, :-1]
            lost += float(cross_entropy(logits.float(), ids[1:], reduction="sum"))
            count += len(ids) - 1
    return lost / count


def _print_steps(arguments: argparse.Namespace, folder: Path) -> None:
    """Seconds of forward and backward at equal rank, the dtypes in turn, so that all see the same machine."""
    models: dict[str, Any] = {}
    kept = arguments.sizes[0]
    for dtype in (None, *arguments.dtypes):
        path = folder / str(dtype)
        settings = {"ratio": kept, "factor_dtype": dtype, "samples": 8, "max_length": 64}
        compile_emulator(arguments.model, arguments.train, path, **settings)
        lora = LoraConfig(r=arguments.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        models[str(dtype)] = get_peft_model(load_emulator(path), lora)
    ids = torch.arange(arguments.batch_size * arguments.max_length).reshape(arguments.batch_size, -1) % 1000
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(arguments.steps):
        for name, model in models.items():
            started = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            seconds[name].append(time.perf_counter() - started)
    reference = median(seconds["bf16"][1:])
    for name, values in seconds.items():
        print(f"{name:6}{median(values[1:]):9.3f} s{median(values[1:]) / reference:8.3f} of bf16, ratio {kept}")


def _print_table(rows: list[dict[str, Any]]) -> None:
    columns = ("emulator", "on_emulator", "uncorrected", "corrected", "share", "step_seconds")
    print(f"\n{'dtype':8}{'bytes':>8}{'rank':>8}" + "".join(f"{name:>14}" for name in columns))
    for key in dict.fromkeys((row["dtype"], row["keep_bytes"], row["rank"]) for row in rows):
        own = [row for row in rows if (row["dtype"], row["keep_bytes"], row["rank"]) == key]
        values = "".join(f"{mean(row[name] for row in own):14.4f}" for name in columns)
        print(f"{key[0]:8}{key[1]:8.3f}{key[2]:8.1f}{values}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a trained causal model")
    parser.add_argument("--train", required=True, help="training data, which calibrates too")
    parser.add_argument("--test", required=True, help="held-out data")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.15, 0.075], help="shares of the bytes at 16 bits")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "int8", "nf4"])
    parser.add_argument("--rank-allocation", default="uniform", choices=["uniform", "spectrum"])
    parser.add_argument("--no-whole", dest="whole", action="store_false", help="without QLoRA")
    parser.add_argument("--steps-only", action="store_true", help="time steps at keep-ratio SIZES[0]; nothing else")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--limit", type=float, default=3.0)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
