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
from onelayer.compiler.correct.candidates import CANDIDATES
from onelayer.compiler.correct.memory import CorrectedShape, correction_bytes, trial_bytes
from onelayer.compiler.data.tokens import load_tokenizer
from onelayer.compiler.evaluate.samples import Samples
from onelayer.compiler.evaluate.scoring import parked_bytes
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.unit_memory import (
    EXPERT_ROWS,
    RESERVE_BYTES,
    CompiledShape,
    moment_bytes,
    solving_bytes,
)
from onelayer.compiler.streaming.spill import SpillPool
from onelayer.runtime.planning.pass_memory import (
    chosen_correct_bytes,
    compile_bytes,
    compiled_shape,
    correct_bytes,
    evaluate_bytes,
    polish_bytes,
    refine_bytes,
)
from onelayer.runtime.planning.read_shapes import shapes_from_headers
from onelayer.runtime.planning.shapes import BlockShape, ModelShapes

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


def compile_terms(shapes: ModelShapes, block: BlockShape) -> int:
    """What the pass promises for a block, from the planner's shapes: moments are not shared, no batch is freed yet."""
    linears = [compiled_shape(linear, RATIO, shapes.value_bytes) for linear in block.compressible]
    moments = moment_bytes(linear.narrow for linear in linears)
    batch = 8 * LENGTH * sum(linear.out_features + linear.in_features for linear in linears)
    if block.experts is None:
        return moments + solving_bytes(linears) + batch
    experts = [compiled_shape(stack, RATIO, shapes.value_bytes) for stack in block.experts.stacks]
    stored = [block.experts.count * expert.stored_bytes for expert in experts]
    rows = 2 * 8 * EXPERT_ROWS * sum(expert.out_features + expert.in_features for expert in experts)
    solver = max(expert.solver_bytes for expert in experts)
    in_experts = 2 * moment_bytes(expert.narrow for expert in experts) + solver + rows + sum(stored) + max(stored)
    return max(moments + solving_bytes(linears) + batch, in_experts)


def test_compile(setup: Setup) -> None:
    """The same terms; the pass adds moments that linears may share, the unit that is read ahead, and a reserve."""
    shapes, report = setup.shapes, setup.compiled.report
    terms = max(block.parameters * shapes.value_bytes + compile_terms(shapes, block) for block, _ in shapes.kinds)
    assert report.workspace_bytes == terms + RESERVE_BYTES
    assert compile_bytes(shapes, RATIO, LENGTH) <= promised(setup.compiled)


def test_a_compile_counts_rounding_and_both_forms() -> None:
    """By hand: the solver of a wide linear, and the rounding of its factors and of its whole weight."""
    plain = CompiledShape(64, 256, 32, 2)
    assert plain.solver_bytes == 8 * 64 * 256 + 8 * 32 * (64 + 4 * 256) + (16 + 2) * 32 * 64
    assert plain.stored_bytes == 2 * 32 * (64 + 256)
    rounded = CompiledShape(64, 256, 32, 2, "nf4", keeps_whole=True)
    values = 32 * (64 + 256)
    assert rounded.solver_bytes == 4 * values + 4 * 8 * 64 * 256
    assert rounded.stored_bytes == (values + 64 * 256) // 64 * 34
    assert solving_bytes([plain, rounded]) == rounded.solver_bytes + plain.stored_bytes + rounded.stored_bytes


def test_trials_count_the_factors_of_a_unit_on_a_host() -> None:
    """By hand: the fullest unit's factors are on the host; the widest linear's are copied."""
    units = [[10, 20], [25], []]
    assert trial_bytes(2, 100, units, on_gpu=True) == 8 * 6 * 100 + 8 * 25
    assert trial_bytes(2, 100, units, on_gpu=False) == 8 * 6 * 100 + 8 * 25 + 4 * 30


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
    """The same formulas; on a host the pass also counts the batches that wait, each once for every candidate."""
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
    planned = chosen_correct_bytes(setup.shapes, RATIO, LORA_RANK, LENGTH, on_gpu=False)
    assert promised(result) <= planned + 8 * MIB
    if setup.fewer:
        return
    scored = evaluate_model(setup.model, setup.data, max_length=LENGTH, device="cpu")
    streamed = StreamedModel(setup.model)
    batches = Samples.read(setup.data, load_tokenizer(setup.model), LENGTH).batches(streamed.config, 1)
    waiting = parked_bytes(streamed, batches, len(CANDIDATES), SpillPool())
    tried = planned - evaluate_bytes(setup.shapes, LENGTH, on_gpu=False)
    assert promised(result) - promised(scored) == tried + waiting


def test_evaluate(setup: Setup) -> None:
    """Both use the same formula; on a host the pass also counts waiting batches."""
    result = evaluate_model(setup.model, setup.data, max_length=LENGTH, device="cpu")
    planned = evaluate_bytes(setup.shapes, LENGTH, on_gpu=False)
    assert planned <= promised(result) <= planned + 8 * MIB


def test_polish(setup: Setup, tmp_path: Path) -> None:
    """Both use the same formula."""
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
    planned = polish_bytes(setup.shapes, LORA_RANK, LENGTH, on_gpu=False)
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
