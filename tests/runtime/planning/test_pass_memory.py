"""The planner counts what will run: the passes of a manifest, mixtures, classifiers, ranks by spectrum."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import tiny_models
from helpers.model_shapes import decoder, mixture
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.ranks import Spectrum, ranks_by_spectrum
from onelayer.compiler.machine.primitives import primitive_bytes
from onelayer.runtime.manifest.manifest import Manifest, load_manifest
from onelayer.runtime.pipeline.costs import Costs
from onelayer.runtime.pipeline.emulator_size import planned_run, size_of_shapes
from onelayer.runtime.pipeline.kinds import step_costs
from onelayer.runtime.pipeline.steps import steps_of
from onelayer.runtime.planning.choice import Size
from onelayer.runtime.planning.pass_memory import compile_bytes, pass_bytes, polish_bytes, refine_bytes
from onelayer.runtime.planning.plan import size_for
from onelayer.runtime.planning.read_shapes import shapes_from_headers, shapes_of
from onelayer.runtime.planning.shapes import ModelShapes
from onelayer.runtime.planning.speed import Speed, seconds_at
from onelayer.runtime.planning.train_memory import PlannedRun, emulator_bytes, train_memory

GIB = 1 << 30
HIDDEN, INNER, NARROW = 4096, 14336, 1024
LARGE = decoder(HIDDEN, INNER, 32, 128256, narrow=NARROW)
MIXTURE = mixture(32, 48, 2, 100, experts=4, per_token=2, value_bytes=4)


def manifest(
    folder: Path,
    size: str,
    *,
    calibration: str = "",
    refine: str = "",
    stream: str = "{}",
    task: str = "",
    max_length: int = 512,
) -> Manifest:
    """Write a manifest with one task on a model whose headers are not read."""
    (folder / "t.jsonl").write_text('{"text": "a"}\n')
    (folder / "m").mkdir(exist_ok=True)
    (folder / "m" / "config.json").write_text("{}")
    (folder / "m.yaml").write_text(
        f"version: 1\nmodel: {{path: m}}\n"
        f"emulator: {{{size}, calibration: {{data: [t.jsonl]{calibration}}}{refine}}}\nstream: {stream}\n"
        f"train: {{max_length: {max_length}, args: {{per_device_train_batch_size: 1}}}}\n"
        f"tasks: {{a: {{train: t.jsonl{task}}}}}\n"
    )
    return load_manifest(folder / "m.yaml")


def size(plan: Manifest, shapes: ModelShapes) -> Size:
    assert plan.emulator is not None
    return size_of_shapes(plan, plan.emulator, shapes)


def test_a_budget_covers_the_batches_that_will_run(tmp_path: Path) -> None:
    shapes = LARGE
    plan = manifest(tmp_path, "memory: 12GiB", calibration=", max_length: 2048", refine=", refine: {batch_size: 8}")
    planned = planned_run(plan, "a")
    assert (planned.compile_tokens, planned.refine_tokens) == (2048, 8 * 2048)
    assert pass_bytes(shapes, size(plan, shapes).ratio, planned)["refine"] <= 0.95 * 12 * GIB
    # 8 samples of 8192 tokens: inputs and outputs of the widest part alone take 6 GiB, and attention takes more.
    wide = manifest(tmp_path, "memory: 24GiB", calibration=", max_length: 8192", stream="{batch_size: 8}")
    assert planned_run(wide, "a").compile_tokens == 8 * 8192
    assert compile_bytes(shapes, 0.95, 8 * 8192) > compile_bytes(shapes, 0.95, 512) + 6 * GIB


def test_a_pass_that_never_fits_is_named_with_the_remedy(tmp_path: Path) -> None:
    plan = manifest(tmp_path, "memory: 6GiB", calibration=", max_length: 8192", stream="{batch_size: 8}")
    with pytest.raises(InputError, match=r"emulator\.memory: too little for compile: .*lower stream\.batch_size"):
        size(plan, LARGE)


def test_a_refinement_that_does_not_run_needs_no_memory(tmp_path: Path) -> None:
    shapes = decoder(HIDDEN, INNER, 12, 32000, narrow=NARROW)
    run = manifest(tmp_path, "memory: 4GiB", refine=", refine: {}", max_length=128)
    refined = size(run, shapes)
    assert 0 < pass_bytes(shapes, refined.ratio, planned_run(run, "a"))["refine"] <= 0.95 * 4 * GIB
    plain = manifest(tmp_path, "memory: 4GiB", refine=", refine: none", max_length=128)
    assert size(plain, shapes) == Size(1.0, "int8")
    assert refined != size(plain, shapes)
    assert pass_bytes(shapes, 0.5, planned_run(plain, "a"))["refine"] == 0


def compile_key(plan: Manifest) -> str:
    return json.dumps(next(dict(step.fields) for step in steps_of(plan, ["a"]) if step.kind == "compile"))


def test_what_decides_the_size_is_in_the_key(tmp_path: Path) -> None:
    shapes = LARGE
    budget, task = "memory: 12GiB", ", ratio: 0.2, max_length: 256"
    loaded = [
        manifest(tmp_path, budget, task=task),
        manifest(tmp_path, budget, task=task.replace("256", "1024")),
        manifest(tmp_path, budget, task=task, refine=", refine: {}"),
        manifest(tmp_path, budget, task=task, stream="{batch_size: 8}"),
    ]
    assert len({compile_key(plan) for plan in loaded}) == len(loaded)
    assert size(loaded[0], shapes) != size(loaded[1], shapes)


def test_an_emulator_with_a_slice_stays_factored(tmp_path: Path) -> None:
    budget = "memory: 64GiB"
    assert size(manifest(tmp_path, budget), LARGE) == Size(1.0, "int8")
    assert size(manifest(tmp_path, budget, task=", ratio: 0.2"), LARGE) == Size(0.95, None)


def test_the_rounding_error_of_whole_weights_is_computed_in_float64() -> None:
    widest = HIDDEN * INNER
    assert compile_bytes(LARGE, 1.0, 1) > LARGE.largest_block_bytes + 3 * 8 * widest
    assert compile_bytes(LARGE, 1.0, 1) < compile_bytes(LARGE, 0.95, 1)


def test_a_refinement_on_a_host_counts_holes_in_its_heap() -> None:
    planned = PlannedRun(batch_size=1, max_length=1024, refine_tokens=1024)
    on_gpu, on_host = (pass_bytes(LARGE, 0.3, replace(planned, on_gpu=gpu)) for gpu in (True, False))
    kernels = primitive_bytes(LARGE.value_bytes, on_gpu=False)
    assert on_host["refine"] > on_gpu["refine"] + kernels
    assert on_host["compile"] == on_gpu["compile"] + kernels


def test_a_budget_leaves_room_for_a_compile_of_many_tokens(tmp_path: Path) -> None:
    tiny_models.save_tiny("llama", tmp_path / "model")
    shapes = shapes_from_headers(tmp_path / "model")
    budget, tokens = GIB, 1 << 20
    assert compile_bytes(shapes, 0.95, tokens) > 0.95 * budget
    assert size_for(tmp_path / "model", budget).ratio == 1.0
    with pytest.raises(InputError, match="--memory: too little for compile"):
        size_for(tmp_path / "model", budget, compile_tokens=tokens)


def test_an_exact_step_counts_each_expert_that_a_token_is_sent_to() -> None:
    shapes = MIXTURE
    # Per token: four matrices of 32 x 32. Each of two experts reads 32, opens 2 * 48, keeps 48 of them and returns 32.
    width = 4 * 64 + 2 * (96 + 48 + 2 * 32)
    # Without a token nothing computes: the slice of the head is smaller than the block that it replaces.
    assert polish_bytes(shapes, 8, 1000) - polish_bytes(shapes, 8, 0) == 2 * 1000 * width * 4
    assert refine_bytes(shapes, 0.3, 1000, "uniform") - refine_bytes(shapes, 0.3, 0, "uniform") == 2 * 1000 * width * 4


def seconds(shapes: ModelShapes, ratio: float) -> float:
    speed = Speed(read_bytes_per_second=1e9, flops_per_second=1e13, device="typed in")
    planned = PlannedRun(batch_size=8, max_length=512, where="sublayer", rank=0.125)
    return seconds_at(speed, shapes, planned, ratio=ratio, samples=64, polish_batch=64).train_step


def test_a_training_step_computes_values_not_bytes() -> None:
    shapes = LARGE
    linears = 32 * (2 * HIDDEN**2 + 2 * HIDDEN * NARROW + 3 * HIDDEN * INNER)
    # Forward, forward again and back: six operations for each value and token, none for the embedding.
    by_hand = 6 * (0.5 * linears + 128256 * HIDDEN) * 8 * 512 / 1e13
    assert seconds(shapes, 0.5) == pytest.approx(by_hand, rel=0.02)
    # In a mixture two of four experts count.
    active = 2 * (4 * 32 * 32 + 2 * 3 * 32 * 48) + 100 * 32
    assert seconds(MIXTURE, 1.0) == pytest.approx(6 * active * 8 * 512 / 1e13, rel=0.02)


def test_a_correction_chosen_on_text_holds_the_block_that_it_streams(tmp_path: Path) -> None:
    shapes = LARGE
    found = {}
    for task in ("", ", validation: t.jsonl"):
        plan = manifest(tmp_path, "ratio: 0.05", task=task)
        costs = Costs(plan, None)
        costs._shapes, costs.size = shapes, Size(0.05, None)
        found[task] = step_costs(next(step for step in steps_of(plan, ["a"]) if step.kind == "correct"), costs)
    plain, chosen = found.values()
    assert plain.peak_bytes is not None
    assert chosen.peak_bytes is not None
    assert plain.peak_bytes < shapes.largest_block_bytes + primitive_bytes(shapes.value_bytes, on_gpu=False)
    # The computing block, the block that is read ahead, and 512 tokens of its inputs and outputs in float32.
    width = 6 * HIDDEN + 2 * NARROW + 2 * HIDDEN + 3 * (HIDDEN + INNER)
    assert chosen.peak_bytes > 2 * shapes.largest_block_bytes + 4 * 512 * width
    assert chosen.read_bytes is not None
    assert plain.read_bytes is not None
    assert shapes.stored_bytes < plain.read_bytes < chosen.read_bytes < 2 * plain.read_bytes


def test_ranks_by_spectrum_stay_within_the_planned_refinement() -> None:
    side, ratio = 64, 0.2
    table: dict[str, tuple[int, ...]] = {"embed.weight": (100, side)}
    table |= {f"layers.{layer}.attention.{name}.weight": (side, side) for layer in range(2) for name in "qkvo"}
    shapes = shapes_of("typed in", {"hidden_size": side, "vocab_size": 100}, table, 4, False)
    flat, steep = ([decay**place for place in range(side)] for decay in (0.9, 0.8))
    spectra = {
        f"{layer}.{name}": Spectrum(side, side, values, sum(value * value for value in values))
        for layer, values in enumerate((flat, steep))
        for name in "qkvo"
    }
    ranks = ranks_by_spectrum(spectra, ratio)
    trained = 2 * side * sum(rank for name, rank in ranks.items() if name.startswith("0."))
    # 26 bytes per trained value, 16 more per value of the largest linear, plus the weights of the block.
    needed = 26 * trained + 16 * trained // 4 + 4 * 4 * side * side
    assert refine_bytes(shapes, ratio, 0, "uniform") < needed, "a layer takes more than its share"
    assert refine_bytes(shapes, ratio, 0, "spectrum") >= needed
    assert refine_bytes(shapes, 0.999, 0, "spectrum") == (26 + 4) * 4 * side * side + 16 * side * side


def test_a_classifier_has_no_loss_over_the_vocabulary(tmp_path: Path) -> None:
    shape = {"vocab_size": 3000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    found = {}
    for kind in ("BertForSequenceClassification", "BertForTokenClassification", "BertForMaskedLM"):
        tiny_models.build("BertConfig", kind, num_attention_heads=2, **shape).save_pretrained(tmp_path / kind)
        shapes = shapes_from_headers(tmp_path / kind)
        found[kind] = train_memory(shapes, emulator_bytes(shapes, 0.5), PlannedRun(8, 512)).loss
    # For each of 4096 tokens, the final norm and its gradient, in model dtype and in float32: four times 32 values.
    assert found["BertForSequenceClassification"] == found["BertForTokenClassification"] == 4096 * 32 * 4 * 4
    assert found["BertForMaskedLM"] > 4096 * 3000 * 4
