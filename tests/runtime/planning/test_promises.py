"""The planner's prediction for every pass, compared with the pass's own promise."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers.classifiers import save_classifier
from helpers.peft_adapters import load_original, random_adapter
from helpers.tiny_models import save_tiny, tiny_tokenizer
from onelayer.compiler import compile_emulator, correct_adapter, evaluate_model, polish_adapter, refine_emulator
from onelayer.compiler.models.unit_memory import RESERVE_BYTES, CorrectedShape, correction_bytes
from onelayer.runtime.planning.pass_memory import (
    chosen_correct_bytes,
    compile_bytes,
    correct_bytes,
    evaluate_bytes,
    polish_bytes,
    refine_bytes,
)
from onelayer.runtime.planning.read_shapes import shapes_from_headers
from onelayer.runtime.planning.shapes import ModelShapes

RATIO, LORA_RANK, LENGTH = 0.5, 4, 16
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTED = {"llama": "all-linear", "llama_tied": "all-linear", "mixtral": ATTENTION, "bert": ["query", "key", "value"]}
MIB = 1 << 20


@dataclass(frozen=True)
class Setup:
    """A model, its shapes as the planner reads them, its emulator, an adapter, and data.

    The planner counts an adapter on every linear; with `fewer` the adapter is on some linears only.
    """

    model: Path
    shapes: ModelShapes
    emulator: Path
    adapter: Path
    data: Path
    compiled: Any
    fewer: bool


@pytest.fixture(scope="module", params=ADAPTED)
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    root: Path = tmp_path_factory.mktemp(request.param)
    label: dict[str, Any] = {}
    is_encoder = request.param == "bert"
    if is_encoder:
        model, label = save_classifier("bert", root / "model"), {"label": "city"}
    else:
        save_tiny(request.param, root / "model")
        tiny_tokenizer(root / "model")
        model = load_original(root / "model")
    task: dict[str, Any] = {"task_type": "SEQ_CLS"} if is_encoder else {}
    # Every row has LENGTH tokens, so that the pass computes as much as the planner counts.
    rows = [{"text": "the quick brown fox jumps over the lazy dog " * 4, **label}] * 4
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    compiled = compile_emulator(
        root / "model", root / "data.jsonl", root / "emulator", ratio=RATIO, max_length=LENGTH, device="cpu"
    )
    random_adapter(model, root / "adapter", r=LORA_RANK, target_modules=ADAPTED[request.param], **task)
    shapes = shapes_from_headers(root / "model")
    made = (root / "emulator", root / "adapter", root / "data.jsonl")
    return Setup(root / "model", shapes, *made, compiled, fewer=is_encoder)


def promised(result: Any) -> int:
    """Return the bound that a pass reports."""
    report = result.report
    return int(report.largest_unit_bytes + report.workspace_bytes)


def test_compile(setup: Setup) -> None:
    """The pass's bound is coarser: separate moments for every linear, the unit that is read ahead, and a reserve."""
    planned = compile_bytes(setup.shapes, RATIO, LENGTH)
    assert planned <= promised(setup.compiled)
    assert promised(setup.compiled) - RESERVE_BYTES <= 4 * planned


def test_refine(setup: Setup, tmp_path: Path) -> None:
    """On a host the pass adds the unit that is read ahead and a reserve."""
    result = refine_emulator(
        setup.emulator,
        model=setup.model,
        calibration=setup.data,
        output=tmp_path / "refined",
        steps=1,
        max_length=LENGTH,
        device="cpu",
    )
    planned = refine_bytes(setup.shapes, RATIO, LENGTH, "uniform", on_gpu=False)
    further = result.report.largest_unit_bytes + RESERVE_BYTES
    assert planned <= promised(result) == pytest.approx(planned + further, rel=0.02)


def test_correct(setup: Setup, tmp_path: Path) -> None:
    """Both use the same formula: three linears at once and all solved factors."""
    result = correct_adapter(
        setup.adapter, emulator=setup.emulator, model=setup.model, output=tmp_path / "corrected", limit=3.0
    )
    planned = correct_bytes(setup.shapes, RATIO, LORA_RANK)
    assert result.report.workspace_bytes <= planned
    assert (result.report.workspace_bytes == planned) != setup.fewer


def test_correct_chosen_by_text(setup: Setup, tmp_path: Path) -> None:
    """Both use the same formulas; on a host the pass also counts waiting batches."""
    result = correct_adapter(
        setup.adapter,
        emulator=setup.emulator,
        model=setup.model,
        output=tmp_path / "corrected",
        limit="auto",
        data=setup.data,
        max_length=LENGTH,
        device="cpu",
    )
    planned = chosen_correct_bytes(setup.shapes, RATIO, LORA_RANK, LENGTH)
    assert promised(result) <= planned + 8 * MIB
    assert setup.fewer or planned <= promised(result)


def test_evaluate(setup: Setup) -> None:
    """Both use the same formula; on a host the pass also counts waiting batches."""
    result = evaluate_model(setup.model, setup.data, max_length=LENGTH, device="cpu")
    planned = evaluate_bytes(setup.shapes, LENGTH)
    assert planned <= promised(result) <= planned + 8 * MIB


def test_polish(setup: Setup, tmp_path: Path) -> None:
    """Both use the same formula, for a GPU in the planner: on a host the graph counts twice because of the heap."""
    result = polish_adapter(
        setup.adapter,
        model=setup.model,
        data=setup.data,
        output=tmp_path / "polished",
        steps=1,
        batch_size=1,
        max_length=LENGTH,
        device="cpu",
    )
    planned = polish_bytes(setup.shapes, LORA_RANK, LENGTH)
    assert promised(result) == pytest.approx(planned, rel=0.02)


def test_a_correction_counts_three_linears_and_what_is_solved() -> None:
    """Computed by hand for ratio 0.25 and rank 8: 3 x 142 MB for the widest linears, and 168 MB of solved factors."""
    widest = CorrectedShape(14336, 4096, 796, 8, 2 * 14336 * 4096)
    by_hand = 16 * MIB + MIB + 8 * (796 + 6 * 8) * (14336 + 4096)
    assert widest.working_bytes == by_hand
    assert correction_bytes([widest] * 5) == 3 * by_hand + 5 * widest.solved_bytes
    many = [widest] * 1000  # written in float32 while the solved factors still exist
    assert correction_bytes(many) == 1500 * widest.solved_bytes
    assert 3 * by_hand == pytest.approx(427e6, rel=0.01)
