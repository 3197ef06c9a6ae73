"""Fixtures that most tests of training share: an original, its emulators, data, and a fast `train_lora`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.reference_emulators import write_emulator
from helpers.tiny_models import save_tiny
from helpers.training_rows import ROWS
from onelayer.runtime import TrainResult, train_lora


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with an original, an exact and a half-size emulator, and data in three forms."""
    root: Path = tmp_path_factory.mktemp("train")
    model = save_tiny("llama", root / "original")
    write_emulator(model, root / "original", root / "exact", base_revision="abc")
    write_emulator(model, root / "original", root / "half", ratio=0.5)
    for form, rows in ROWS.items():
        (root / f"{form}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def train(place: Path, tmp_path: Path) -> Callable[..., TrainResult]:
    """Return `train_lora` on the half-size emulator, with small and fast defaults."""

    def run(name: str = "adapter", emulator: str = "half", data: str = "text", **settings: Any) -> TrainResult:
        quick = {"max_steps": 2, "batch_size": 2, "lora_rank": 4, "target_modules": ["q_proj", "down_proj"], **settings}
        return train_lora(place / emulator, place / f"{data}.jsonl", tmp_path / name, **quick)

    return run
