"""The planner on codes: what it counts is what a compile makes, and what it chooses by card and by manifest."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.mixtures import WIDE_MIXTURES
from helpers.model_shapes import decoder
from helpers.tiny_models import VOCAB, seeded
from onelayer.compiler.codes.forms import DECODED_VALUES, LEAST_SHARE, WHOLE_SHARE
from onelayer.compiler.compile import selection
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.hardware import shows_gpu
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.unit_memory import RESERVE_BYTES
from onelayer.compiler.streaming.unit_loads import UnitLoads
from onelayer.runtime.manifest.manifest import Manifest, load_manifest
from onelayer.runtime.pipeline.costs import CostBasis, compile_costs, train_costs
from onelayer.runtime.pipeline.emulator_size import size_of_shapes
from onelayer.runtime.pipeline.steps import steps_of
from onelayer.runtime.planning.choice import Choice, Size, best_ratio, best_stored, choose_each, limiting_pass
from onelayer.runtime.planning.coded import coded_emulator, coded_experts, share_of
from onelayer.runtime.planning.pass_memory import coded_compile_bytes, pass_bytes
from onelayer.runtime.planning.plan import plan_run
from onelayer.runtime.planning.read_shapes import shapes_from_headers
from onelayer.runtime.planning.shapes import ModelShapes
from onelayer.runtime.planning.speed import Speed, seconds_at
from onelayer.runtime.planning.train_memory import PlannedRun, active_values, emulator_bytes, train_memory
from onelayer.runtime.reporting.run_summaries import plan_summary

GIB = 1 << 30
SMALL = decoder(576, 1536, 30, 49152, narrow=192)
LARGE = {
    "8B": decoder(4096, 14336, 32, 128256, narrow=1024),
    "14B": decoder(5120, 17408, 40, 151936, narrow=1024),
    "32B": decoder(5120, 25600, 64, 151936, narrow=1024),
    "70B": decoder(8192, 28672, 80, 128256, narrow=1024),
}


def chosen(shapes: ModelShapes, planned: PlannedRun, gib: int) -> Choice:
    choices = choose_each(shapes, planned, gib * GIB)
    return choices[best_stored({stored: choice.ratio for stored, choice in choices.items()})]


def test_what_is_counted_is_what_a_compile_makes(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    seeded(lambda: LlamaForCausalLM(config)).save_pretrained(tmp_path / "model")
    streamed, shapes = StreamedModel(tmp_path / "model"), shapes_from_headers(tmp_path / "model")
    ratio = 0.25 / WHOLE_SHARE
    codes = coded_emulator(shapes, ratio)
    assert codes is not None
    coded = selection.choose_codes(streamed, selection.choose_ranks(streamed, ratio, quantized=True), 0.25)
    assert coded is not None
    code, ranks = coded
    assert code == codes.code
    assert emulator_bytes(shapes, ratio, "coded") == selection.emulator_bytes(streamed, ranks, {}, "nf4", code)
    loads = UnitLoads()
    for unit in streamed.units:
        loads.note(unit, torch.empty(1, 16, 1, device="meta"), None)
    inputs = {unit.position: [128, 128, 128, 192] for unit in streamed.units if unit.is_block}  # q, k, v read the same
    promised = streamed.largest_unit_bytes + selection.coded_workspace(
        streamed, selection.Choice(ranks, {}, code), loads, on_gpu=False, inputs=inputs
    )
    # On a host the pass adds the unit that is read ahead and a reserve; norms count as matrices in neither.
    further = streamed.largest_unit_bytes + RESERVE_BYTES
    assert promised == pytest.approx(coded_compile_bytes(shapes, ratio, 16, on_gpu=False) + further, rel=0.01)


def test_experts_are_counted_as_the_codes_that_a_compile_makes(tmp_path: Path) -> None:
    model = seeded(lambda: WIDE_MIXTURES["mixtral"]())
    model.save_pretrained(tmp_path / "model")
    streamed, shapes = StreamedModel(tmp_path / "model"), shapes_from_headers(tmp_path / "model")
    ratio = 0.25 / WHOLE_SHARE
    linears = selection.choose_codes(streamed, selection.choose_ranks(streamed, ratio, quantized=True), 0.25)
    stacks = selection.choose_stack_codes(streamed, selection.choose_stacks(streamed, ratio, quantized=True), 0.25)
    experts = coded_experts(shapes, ratio)
    assert linears is not None
    assert stacks is not None
    assert experts is not None
    assert experts.code == stacks[0]
    assert set(stacks[1].values()) == {experts.rank(stack) for stack in shapes.blocks[0].stacks}
    counted = selection.emulator_bytes(streamed, linears[1], stacks[1], "nf4", linears[0], stacks[0])
    assert emulator_bytes(shapes, ratio, "coded") == counted
    assert active_values(shapes, ratio, coded=True) > shapes.active_parameters


def test_a_size_of_codes_is_a_share_of_the_bytes() -> None:
    linears = sum(linear.parameters for block in SMALL.blocks for linear in block.compressible)
    for share in (0.1, 0.145, 0.25):
        kept = emulator_bytes(SMALL, share / WHOLE_SHARE, "coded") - (SMALL.parameters - linears) * SMALL.value_bytes
        assert kept == pytest.approx(2 * share * linears, rel=0.01)
        assert kept <= 2 * share * linears
    assert coded_emulator(SMALL, 0.07 / WHOLE_SHARE) is None
    assert coded_emulator(decoder(32, 64, 2, 100, narrow=16), 0.2 / WHOLE_SHARE) is None


@pytest.mark.parametrize(("name", "gib"), [("14B", 8), ("32B", 12), ("70B", 24)])
def test_cards_on_which_not_even_nf4_fits_get_codes(name: str, gib: int) -> None:
    planned = PlannedRun(batch_size=2, max_length=1024)
    choice = chosen(LARGE[name], planned, gib)
    assert choice.stored == "coded"
    assert LEAST_SHARE <= share_of(choice.reached) < WHOLE_SHARE
    assert choice.memory.peak <= 0.95 * gib * GIB
    assert max(pass_bytes(LARGE[name], choice.reached, choice.planned).values()) <= 0.95 * gib * GIB
    assert limiting_pass(LARGE[name], choice, gib * GIB).startswith(("train: ", "compile: ", "refine: "))


def test_whole_weights_go_before_codes() -> None:
    assert best_stored({"bf16": 0.2, "int8": 0.5, "nf4": 1.0, "coded": 0.999}) == "nf4"
    assert best_stored({"bf16": 0.2, "int8": 0.9, "nf4": 1.0, "coded": 0.999}) == "int8"
    assert best_stored({"bf16": 0.2, "int8": 0.5, "nf4": 0.95, "coded": 0.93}) == "coded"
    assert best_stored({"bf16": None, "int8": 0.02, "nf4": 0.1, "coded": None}) == "nf4"
    planned = PlannedRun(batch_size=1, max_length=512)
    assert chosen(LARGE["8B"], planned, 16).size == Size(1.0, "int8")
    nothing = best_ratio(LARGE["70B"], planned, 8 * GIB, "coded")
    assert nothing.ratio is None


def test_training_and_refinement_count_a_decoded_weight() -> None:
    shapes, planned = LARGE["8B"], PlannedRun(1, 512, where="sublayer", rank=0.125, refine_tokens=512)
    factors, coded = (train_memory(shapes, 0, replace(planned, coded=kind)) for kind in (False, True))
    widest = 4096 * 14336
    assert coded.recompute - factors.recompute == pytest.approx(DECODED_VALUES * (2 * 2 + 5 / 2), rel=1e-6)
    ratio = 0.145 / WHOLE_SHARE
    passes = pass_bytes(shapes, ratio, replace(planned, coded=True))
    values = coded_emulator(shapes, ratio)
    assert values is not None
    trained = sum(values.trained_values(linear) for linear in shapes.blocks[0].compressible)
    assert passes["refine"] > shapes.largest_block_bytes + 26 * trained + 6 * 4 * widest
    whole = pass_bytes(shapes, 1.0, planned)
    assert passes["correct"] == whole["correct"], "a correction uses the weights that codes stand for"


def test_the_plan_tells_the_time_of_the_way_back(tmp_path: Path) -> None:
    speed = Speed(read_bytes_per_second=1e9, flops_per_second=1e13, device="typed in")
    plain, coded = (
        seconds_at(speed, LARGE["8B"], planned, ratio=0.145 / WHOLE_SHARE, samples=64, polish_batch=64)
        for planned in (PlannedRun(8, 512, where="sublayer"), PlannedRun(8, 512, where="sublayer", coded=True))
    )
    assert plain.compile_backward is None
    multiplied = LARGE["8B"].parameters - 128256 * 4096  # all but the embedding
    back = max(2 * LARGE["8B"].parameters / 1e9, 4 * multiplied * 64 * 512 / 1e13)
    assert coded.compile_backward == pytest.approx(back, rel=0.05)
    assert coded.compile > plain.compile + back
    assert coded.train_step > plain.train_step, "a decoded weight computes as a whole one"
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 32000}
    config |= {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = plan_run(tmp_path, 2 * GIB, form="coded", speed=speed)
    assert (plan.form, plan.factor_dtype) == ("coded", "nf4")
    assert plan.keep_bytes is not None
    text = plan_summary(plan.model_dump(mode="json"))
    assert f"codes at {plan.keep_bytes} of the bytes" in text
    assert "compile backward" in text
    assert plan_run(tmp_path, 2 * GIB, form="factors", speed=speed).form == "factors"
    with pytest.raises(InputError, match="--factor-dtype int8: codes"):
        plan_run(tmp_path, 2 * GIB, form="coded", factor_dtype="int8", speed=speed)


def manifest(folder: Path, emulator: str, task: str = "") -> Manifest:
    """Write a manifest with one task on a model whose headers are not read."""
    (folder / "t.jsonl").write_text('{"text": "a"}\n')
    (folder / "m").mkdir(exist_ok=True)
    (folder / "m" / "config.json").write_text("{}")
    (folder / "m.yaml").write_text(
        f"version: 1\nmodel: {{path: m}}\nemulator: {{calibration: {{data: t.jsonl}}{emulator}}}\n"
        f"train: {{args: {{per_device_train_batch_size: 1}}}}\ntasks: {{a: {{train: t.jsonl{task}}}}}\n"
    )
    return load_manifest(folder / "m.yaml")


def size(loaded: Manifest, shapes: ModelShapes) -> Size:
    assert loaded.emulator is not None
    return size_of_shapes(loaded, loaded.emulator, shapes)


@pytest.mark.parametrize(
    ("emulator", "task", "coded"),
    [
        ("", "", True),
        (", keep_bytes: 0.145", "", True),
        (", keep_bytes: 0.3", "", False),
        (", keep_bytes: 0.145, form: factors", "", False),
        (", keep_bytes: 0.145, factor_dtype: nf4", "", False),
        (", keep_bytes: 0.145", ", ratio: 0.1", False),
        (", ratio: 0.2", "", False),
    ],
)
def test_a_manifest_chooses_the_form(tmp_path: Path, emulator: str, task: str, coded: bool) -> None:
    loaded = manifest(tmp_path, emulator, task)
    assert size(loaded, SMALL).coded == coded
    assert not size(loaded, decoder(32, 64, 2, 100, narrow=16)).coded, "linears too small for codes"
    fields = next(dict(step.fields) for step in steps_of(loaded, ["a"]) if step.kind == "compile")
    assert ("form" in fields) == coded, "what can only be factors keeps its old key"


def test_memory_in_a_manifest_chooses_codes(tmp_path: Path) -> None:
    loaded = manifest(tmp_path, ", memory: 12GiB")
    found = size(loaded, LARGE["14B"])
    assert found.coded
    assert found.compile_settings("spectrum") == {"keep_bytes": share_of(found.ratio)}
    assert not size(manifest(tmp_path, ", memory: 12GiB, form: factors"), LARGE["14B"]).coded
    assert size(manifest(tmp_path, ", memory: 14GiB, form: coded"), LARGE["8B"]).coded
    with pytest.raises(InputError, match=r"emulator\.ratio: the size of codes"):
        manifest(tmp_path, ", ratio: 0.2, form: coded")


def test_factors_weighted_by_gradients_are_counted_and_in_the_key(tmp_path: Path) -> None:
    found, shapes = {}, LARGE["8B"]
    for backward in ("", ", backward: true"):
        loaded = manifest(tmp_path, f", keep_bytes: 0.4, factor_dtype: nf4{backward}")
        step = next(step for step in steps_of(loaded, ["a"]) if step.kind == "compile")
        found[backward] = step, compile_costs(CostBasis(step, loaded, shapes, size(loaded, shapes)))
    (plain, before), (weighted, after) = found.values()
    assert dict(weighted.fields) == {**plain.fields, "backward": True}
    assert "backward" not in plain.fields
    assert (before.read_bytes, after.read_bytes) == (2 * shapes.parameters, 2 * 2 * shapes.parameters)
    assert before.peak_bytes is not None
    assert after.peak_bytes is not None
    assert after.peak_bytes > before.peak_bytes


def test_a_dry_run_counts_codes(tmp_path: Path) -> None:
    loaded = manifest(tmp_path, ", keep_bytes: 0.145")
    steps, shapes = {step.kind: step for step in steps_of(loaded, ["a"])}, LARGE["8B"]
    compiled, trained = (
        costs(CostBasis(steps[kind], loaded, shapes, size(loaded, shapes)))
        for kind, costs in (("compile", compile_costs), ("train", train_costs))
    )
    assert compiled.read_bytes == 2 * 2 * shapes.parameters, "one pass forward, one back"
    assert compiled.peak_bytes == coded_compile_bytes(shapes, 0.145 / WHOLE_SHARE, 512)
    assert compiled.write_bytes == emulator_bytes(shapes, 0.145 / WHOLE_SHARE, "coded")
    planned = PlannedRun(1, 512, coded=True, allocation="uniform", on_gpu=shows_gpu())
    assert trained.peak_bytes == train_memory(shapes, compiled.write_bytes, planned).peak
