"""What befalls one of several processes ends all of them soon, with one line, and leaves nothing half-written."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.children import interrupt
from helpers.launched import Launched, launch
from helpers.launched_work import Fault, run_with_fault, wait_alone
from helpers.peft_adapters import load_original, random_adapter
from helpers.tiny_models import HIDDEN, SPECIAL_IDS, VOCAB, build, tiny_tokenizer
from onelayer.compiler import compile_emulator, polish_adapter, refine_emulator

TEXTS = [f"the quick brown fox {count} jumps over the lazy dog" + " again" * (count % 3) for count in range(5)]
POSITIONS = 48
# Data that one process alone finds fault with: the embedding of a token is broken, and a row is too long.
ROWS = {"good": TEXTS, "broken": [*TEXTS, "? why " * 9], "long": [*TEXTS, "again and " * 20]}
TRAINED = {"batch_size": 1, "max_length": 16, "lora_rank": 2, "save_steps": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a table of positions and one token that it cannot read, its emulator, an adapter and data."""
    path: Path = tmp_path_factory.mktemp("faults")
    shape = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
    model = build("GPT2Config", "GPT2LMHeadModel", **shape, **SPECIAL_IDS, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny_tokenizer(path / "model").convert_tokens_to_ids("?")] = float("nan")
    model.save_pretrained(path / "model")
    for name, texts in ROWS.items():
        (path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    compile_emulator(path / "model", path / "good.jsonl", path / "emulator", max_length=16, ratio=0.5)
    random_adapter(load_original(path / "model"), path / "adapter", size=0.1, r=2, target_modules=["c_attn"])
    return path


def keywords(place: Path, command: str, rows: str = "good") -> dict[str, Any]:
    """Return what a command is given by name."""
    model, data = place / "model", place / f"{rows}.jsonl"
    given: dict[str, dict[str, Any]] = {
        "compile": {"calibration": data, "ratio": 0.5, "batch_size": 1, "max_length": 64},
        "train": {"data": data, **TRAINED, "max_steps": 8},
        "refine": {"model": model, "calibration": data, "steps": 2, "batch_size": 1, "max_length": 64},
        "polish": {"model": model, "data": data, "steps": 2, "batch_size": 8, "lora_rank": 2, "max_length": 64},
        "evaluate": {"data": data, "batch_size": 1, "max_length": 64},
        "correct": {"model": model, "data": data, "emulator": place / "emulator"},
        "correct without data": {"model": model, "emulator": place / "emulator"},
    }
    return given[command]


def subject(place: Path, command: str) -> list[Path | None]:
    """Return what a command is given without a name."""
    names = {"refine": "emulator", "train": "emulator", "correct": "adapter"}
    return [None if command == "polish" else place / names.get(command.split()[0], "model")]


def launched(place: Path, tmp_path: Path, command: str, fault: Fault | None = None, rows: str = "good") -> Launched:
    """Run a command in two processes."""
    given = keywords(place, command, rows) | ({} if command == "evaluate" else {"output": tmp_path / "out"})
    options = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    found = [command.split()[0], *(path for path in subject(place, command) if path is not None), *options]
    if fault is None:
        return launch(2, found, tmp_path / "logs")
    return launch(2, [json.dumps(asdict(fault)), *found], tmp_path / "logs", work=run_with_fault)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a directory; the broken embedding is zero."""
    found = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {name: tensor.nan_to_num() for name, tensor in found.items()}


# The function in which a command is struck, by its second call: something is finished and kept then, if ever.
MOMENTS = {
    "compile": ("onelayer.compiler.compile.job:Compilation", "_write"),
    "train": ("onelayer.runtime.training.trainers:LoraTrainer", "training_step"),
    "refine": ("onelayer.compiler.refine.job:UnitTraining", "_train"),
    "polish": ("onelayer.compiler.polish.job:PolishJob", "_step"),
    "evaluate": ("onelayer.compiler.streaming.stream:Stream", "_visit"),
    "correct": ("onelayer.compiler.streaming.stream:Stream", "_visit"),
}
# What a command keeps for the next run.
KEPT = {
    "compile": ".out.compile/unit-*.json",
    "refine": ".out.refine/unit-*.safetensors",
    "polish": ".out.polish/state.safetensors",
    "train": ".out.training/checkpoint-*/complete",
}
PASSES: dict[str, Callable[..., Any]] = {
    "compile": compile_emulator,
    "refine": refine_emulator,
    "polish": polish_adapter,
}
# Each command is killed, and stopped, in one of its processes; which one it is makes no difference.
SIGNALS = [
    *((command, "SIGKILL", rank) for command, rank in zip(MOMENTS, (1, 0, 1, 0, 0, 1), strict=True)),
    ("evaluate", "SIGTERM", 0),
    ("refine", "SIGTERM", 1),
    ("correct", "SIGINT", 0),
    ("polish", "SIGINT", 1),
]
EXIT_CODES = {"SIGKILL": -9, "SIGTERM": 130, "SIGINT": 130}
# The disk is full for what waits in files, and for what process 0 writes.
FULL = [
    ("evaluate", 1, "os", "posix_fallocate"),
    ("refine", 1, "os", "posix_fallocate"),
    ("polish", 0, "os", "fsync"),
    ("correct", 0, "os", "fsync"),
    ("train", 1, "onelayer.runtime.training.trainers:LoraTrainer", "_save_rng_state"),
]
NOT_FINITE = {"refine": "are not finite", "polish": "not finite", "evaluate": "loss is nan", "train": "the loss is nan"}
BAD_ROWS = [
    *((command, "broken", message) for command, message in NOT_FINITE.items()),
    *((command, "long", f"table of positions ends after {POSITIONS}") for command in ("correct", "polish")),
]


# Where a process can be late: while it reads what an earlier run left, or before it looks whether the output is free.
LATE = {
    "compile": ("onelayer.compiler.compile.resume", "sha256_file"),
    "correct without data": ("onelayer.compiler.correct.command", "check_output"),
}


def check_ended(ended: Launched, *messages: str) -> None:
    """Check that all processes ended soon, and that one line says why."""
    printed = [line for line in ended.printed.splitlines() if "onelayer: note: " not in line]
    lines = [line for line in printed if "onelayer: " in line]
    assert 0 not in ended.codes, ended.printed
    assert ended.seconds < 10
    assert len(lines) == 1, ended.printed
    assert "Traceback" not in ended.printed
    assert any(message in lines[0] for message in messages), lines[0]


def check_nothing_half_written(tmp_path: Path, command: str) -> None:
    """Check that there is no output, and next to it only what the next run takes up."""
    kept = Path(KEPT[command]).parts[0] if command in KEPT else "logs"
    assert {path.name for path in tmp_path.iterdir()} <= {"logs", kept, f"{kept}.lock"}


@pytest.mark.parametrize(("command", "signal", "rank"), SIGNALS)
def test_a_signal_to_one_process_ends_all(place: Path, tmp_path: Path, command: str, signal: str, rank: int) -> None:
    ended = launched(place, tmp_path, command, Fault(rank, signal, *MOMENTS[command], 2))
    assert ended.codes[rank] == EXIT_CODES[signal], ended.printed
    check_ended(ended, "another process" if signal == "SIGKILL" else "onelayer: interrupted; ")
    check_nothing_half_written(tmp_path, command)
    assert command not in KEPT or any(tmp_path.glob(KEPT[command]))
    if signal == "SIGKILL" and command in PASSES:  # one process goes on
        for name in ("out", "undisturbed"):
            PASSES[command](*subject(place, command), **keywords(place, command), output=tmp_path / name)
        found, wanted = (weights(tmp_path / name) for name in ("out", "undisturbed"))
        limit = 0.0 if command == "compile" else 1e-5
        assert all(float((found[name] - wanted[name]).abs().max()) <= limit for name in wanted)


@pytest.mark.parametrize(("command", "rank", "module", "function"), FULL)
def test_a_full_disk(place: Path, tmp_path: Path, command: str, rank: int, module: str, function: str) -> None:
    ended = launched(place, tmp_path, command, Fault(rank, "ENOSPC", module, function, 2))
    check_ended(ended, "disk is full", "No space left")
    check_nothing_half_written(tmp_path, command)


@pytest.mark.parametrize("command", LATE)
def test_nothing_is_published_before_a_late_process_is_there(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Of the compile only its publishing is left, so that the process that does it need not wait for the other."""
    if command == "compile":
        with monkeypatch.context() as patch:
            patch.setattr("onelayer.compiler.compile.command._finished", lambda *arguments: interrupt())
            with pytest.raises(KeyboardInterrupt):
                PASSES[command](*subject(place, command), **keywords(place, command), output=tmp_path / "out")
        assert any(tmp_path.glob(KEPT[command]))
    ended = launched(place, tmp_path, command, Fault(1, "late", *LATE[command], 1))
    assert ended.codes == [0, 0], ended.printed
    assert {path.name for path in tmp_path.iterdir()} == {"logs", "out"}


@pytest.mark.parametrize(("command", "rows", "message"), BAD_ROWS)
def test_a_row_that_one_process_alone_reads(place: Path, tmp_path: Path, command: str, rows: str, message: str) -> None:
    check_ended(launched(place, tmp_path, command, rows=rows), message)
    check_nothing_half_written(tmp_path, command)


def test_a_process_that_waits_for_another_can_be_stopped(tmp_path: Path) -> None:
    """A launcher stops the others so where one has ended before all were there."""
    ended = launch(2, ["evaluate", tmp_path], tmp_path / "logs", work=wait_alone)
    check_ended(ended, "onelayer: interrupted; ")
    assert ended.codes == [130, 1]
