"""The planner: its shapes are the compiler's, its predictions are as measured, its choices follow the budget."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny_models
from helpers.model_shapes import decoder, mixture
from helpers.places import ROOT
from onelayer.compiler.compile import selection
from onelayer.compiler.compile.selection import choose_ranks, choose_stacks, stacked_parameters, stored_parameters
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.ranks import rank_for
from onelayer.compiler.factors.stored_forms import FACTOR_DTYPES, best_of
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.runtime.planning.choice import LARGEST_RATIO, USABLE_SHARE, Size, best_ratio, choose_each, limiting_pass
from onelayer.runtime.planning.pass_memory import WHOLE
from onelayer.runtime.planning.plan import plan_run, size_for
from onelayer.runtime.planning.read_shapes import read_shapes, shapes_from_headers
from onelayer.runtime.planning.speed import Speed
from onelayer.runtime.planning.sub_blocks import expert_parts
from onelayer.runtime.planning.train_memory import PlannedRun, emulator_bytes, stored_copy_bytes, train_memory
from onelayer.runtime.planning.ways import anchor_costs
from scripts.plan import measure

GIB = 1 << 30
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", tiny_models.DECODER),
    "tied": ("LlamaConfig", "LlamaForCausalLM", {**tiny_models.DECODER, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128}),
    "mixture": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**tiny_models.DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "transposed stacks": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **tiny_models.DECODER,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 24,
            "head_dim": 8,
        },
    ),
}


def saved(folder: Path, name: str) -> Path:
    config_class, model_class, fields = MODELS[name]
    tiny_models.build(config_class, model_class, **fields).save_pretrained(folder / name)
    return folder / name


LARGE = decoder(4096, 14336, 32, 128256)


@pytest.mark.parametrize("name", MODELS)
def test_headers_say_what_the_compiler_finds(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, name)
    shapes, streamed = shapes_from_headers(folder), StreamedModel(folder)
    assert shapes.parameters == stored_parameters(streamed)
    assert sum(block.experts.parameters for block in shapes.blocks if block.experts) == stacked_parameters(streamed)
    planned = {
        f"{block.name}.{linear.name}": rank_for(0.3, linear.out_features, linear.in_features)
        for block in shapes.blocks
        for linear in block.compressible
    }
    assert planned == choose_ranks(streamed, 0.3)
    stacks = [stack for block in shapes.blocks if block.experts for stack in block.experts.stacks]
    ranks = [rank_for(0.3, stack.out_features, stack.in_features) for stack in stacks]
    found = choose_stacks(streamed, 0.3)
    assert sorted(map(str, ranks)) == sorted(map(str, found.values()))
    assert emulator_bytes(shapes, 0.3) == selection.emulator_bytes(streamed, planned, found, None)


@pytest.mark.parametrize("name", MODELS)
def test_a_config_alone_gives_the_same_shapes(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, name)
    with_weights = read_shapes(folder)
    (folder / "model.safetensors").unlink()
    alone = read_shapes(folder)
    assert not alone.has_weights
    assert (alone.parameters, alone.hidden, alone.value_bytes) == (
        with_weights.parameters,
        with_weights.hidden,
        with_weights.value_bytes,
    )
    assert emulator_bytes(alone, 0.3) == emulator_bytes(with_weights, 0.3)
    assert alone.active_parameters == with_weights.active_parameters


@pytest.mark.parametrize("name", ["mixture", "transposed stacks"])
def test_experts_open_and_close_in_either_orientation(tmp_path: Path, name: str) -> None:
    shapes = shapes_from_headers(saved(tmp_path, name))
    inner = MODELS[name][2].get("moe_intermediate_size") or MODELS[name][2]["intermediate_size"]
    assert expert_parts(shapes, shapes.blocks[0]) == (2 * 2 * inner, 2 * inner)


def test_low_rank_experts_fit_where_dense_experts_would_not() -> None:
    shapes = mixture(1024, 512, 8, 1000, experts=64, per_token=4)
    dense = shapes.parameters * shapes.value_bytes
    choice = best_ratio(shapes, PlannedRun(batch_size=2, max_length=256), dense)
    assert choice.reached > 0.3
    assert emulator_bytes(shapes, 0.25) == pytest.approx(0.25 * dense, rel=0.02)


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    code = (
        "import sys; from onelayer.runtime.pipeline.costs import *; "
        f"from onelayer.runtime.planning.read_shapes import *; shapes_from_headers({str(folder)!r}); "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    paths = [str(ROOT / name) for name in ("compiler", "runtime")]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}; {code}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


def test_more_memory_never_allows_less_and_what_is_chosen_fits() -> None:
    planned = PlannedRun(batch_size=4, max_length=1024)
    reached = [best_ratio(LARGE, planned, card * GIB).reached for card in (16, 24, 32, 48, 64)]
    assert reached == sorted(reached)
    assert reached[-1] > reached[0]
    for card in (24, 48):
        choice = best_ratio(LARGE, planned, card * GIB)
        if choice.ratio is not None:
            assert choice.memory.peak <= 0.95 * card * GIB
            over = train_memory(LARGE, emulator_bytes(LARGE, choice.ratio + 0.002), planned).peak
            assert over > 0.95 * card * GIB or choice.ratio == 0.95


def test_a_plan_is_one_document_with_the_promised_keys(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    speed = Speed(read_bytes_per_second=1e9, flops_per_second=1e12, device="typed in")
    document = plan_run(folder, GIB, max_length=64, batch_size=2, speed=speed).model_dump(mode="json")
    assert document["fits"] is True
    assert {"fits", "ratio", "activations", "activation_rank", "predicted"} <= set(document)
    assert {"compile_bytes", "train_bytes", "correct_bytes", "emulator_bytes"} <= set(document["predicted"])
    assert [(row["form"], row["factor_dtype"]) for row in document["choices"]] == [
        *(("factors", dtype) for dtype in FACTOR_DTYPES),
        ("coded", "nf4"),
    ]
    assert document["seconds"]["polish_step"] > document["seconds"]["correct"]
    assert document["seconds"]["refine"] > document["seconds"]["compile"]
    times = document["seconds"]["correct_1000_tokens"] * document["speed"]["flops_per_second"]
    runs = 1 + 18 / 8 + 4 * 7 / 8  # of the original, of 18 candidates over an eighth of the rows, of 4 over the others
    parameters = times / (2 * 1000 * runs)
    assert 0.5 * parameters < document["predicted"]["model_bytes"] / 4 < 2 * parameters
    assert "the original itself fits" in document["remarks"][0]
    assert json.loads(json.dumps(document)) == document


def test_too_little_memory_names_the_limit_and_what_to_give_up(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    plan = plan_run(folder, 100 << 20, max_length=512, batch_size=8, timing=False)
    assert (plan.fits, plan.ratio) == (False, None)
    assert plan.limit.startswith("train: the loss")
    assert any(row.give_up == "--batch-size 1" for row in plan.give_up)
    with pytest.raises(InputError, match="--memory: too little for train: the loss"):
        size_for(folder, 100 << 20)


def test_quantized_factors_hold_more_in_the_same_bytes() -> None:
    sizes = [emulator_bytes(LARGE, 0.3, dtype) for dtype in ("bf16", "int8", "nf4")]
    assert sizes == sorted(sizes, reverse=True)
    planned = PlannedRun(batch_size=1, max_length=1024, where="sublayer", rank=0.125, refine_tokens=0)
    plain, nf4 = (best_ratio(LARGE, planned, 8 * GIB, dtype).reached for dtype in ("bf16", "nf4"))
    assert nf4 > 2 * plain > 0


def test_rank_comes_before_precision() -> None:
    planned = PlannedRun(batch_size=1, max_length=1024)
    for card, expected in (
        (6, "nf4"),
        (8, "nf4"),
        (12, "int8"),
        (16, "int8"),
        (20, "int8"),
        (24, "int8"),
        (64, "int8"),
    ):
        choices = choose_each(LARGE, planned, card * GIB)
        assert list(choices) == ["bf16", "int8", "nf4", "coded"]
        assert best_of({dtype: choices[dtype].ratio for dtype in FACTOR_DTYPES}) == expected
    assert best_of({"bf16": None, "int8": None, "nf4": None}) == "nf4"
    assert best_of({"bf16": 0.94, "int8": 1.0, "nf4": 1.0}) == "int8"  # rounding costs less than truncation


@pytest.mark.parametrize(("card", "expected"), [(12, "int8"), (16, "int8"), (20, "bf16"), (64, "bf16")])
def test_an_emulator_that_is_sliced_keeps_no_weight_whole(card: int, expected: str) -> None:
    choices = choose_each(LARGE, PlannedRun(batch_size=1, max_length=1024, is_sliced=True), card * GIB)
    ratios = {dtype: choices[dtype].reached for dtype in FACTOR_DTYPES}
    assert max(ratios.values()) == LARGEST_RATIO
    assert best_of(ratios) == expected


def test_whole_weights_are_considered_if_rounding_saves_memory() -> None:
    planned = PlannedRun(batch_size=1, max_length=1024, where="sublayer", rank=0.5)
    held = best_ratio(LARGE, planned, 64 * GIB, "int8")
    assert (held.ratio, held.memory.emulator) == (WHOLE, emulator_bytes(LARGE, WHOLE, "int8"))
    assert limiting_pass(LARGE, held, 64 * GIB) == "nothing: all weights fit whole, rounded to int8"
    assert best_ratio(LARGE, planned, 64 * GIB).ratio == LARGEST_RATIO
    # Slightly less than all weights need: factors are chosen, and the obstacle to whole weights is named.
    needed = int(held.memory.peak / USABLE_SHARE)
    less = best_ratio(LARGE, planned, needed - (64 << 20), "int8")
    assert less.reached == LARGEST_RATIO
    assert limiting_pass(LARGE, less, needed - (64 << 20)).startswith("train: the emulator's weights")
    # If all weights fit in int8 only with coarser activations, they are taken, as rounding costs less than truncation.
    exact = replace(planned, where="none", rank=None)
    tight = int(best_ratio(LARGE, exact, 64 * GIB, "int8").memory.peak / USABLE_SHARE) - (64 << 20)
    assert best_ratio(LARGE, exact, tight, "int8").reached == LARGEST_RATIO
    chosen = choose_each(LARGE, planned, tight)["int8"]
    assert (chosen.ratio, chosen.planned.where) == (WHOLE, "sublayer")


def test_a_plan_chooses_the_factor_dtype_with_the_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, "llama")
    # If all weights fit, they are rounded to int8; a given dtype is kept.
    assert size_for(folder, GIB) == Size(WHOLE, "int8")
    assert size_for(folder, GIB, factor_dtype="bf16") == Size(LARGEST_RATIO, "bf16")
    assert plan_run(folder, GIB, timing=False).factor_dtype == "int8"
    small = plan_run(folder, 100 << 20, timing=False)
    assert small.factor_dtype == "nf4"
    assert not any("bitsandbytes" in remark for remark in small.remarks)
    named = plan_run(folder, GIB, max_length=16, batch_size=1, factor_dtype="int8", timing=False)
    assert named.factor_dtype == "int8"
    assert named.predicted.emulator_bytes == next(
        row.emulator_bytes for row in named.choices if row.factor_dtype == "int8"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lacking = plan_run(folder, 100 << 20, timing=False)
    assert any("bitsandbytes" in remark and "--factor-dtype int8" in remark for remark in lacking.remarks)


def test_spectra_predict_the_error_of_each_choice(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    emulator = tmp_path / "emulator"
    emulator.mkdir()
    values = [math.sqrt(0.5), *[math.sqrt(0.05)] * 9]  # an energy of 1, most of it in one direction
    rows = [
        {"name": f"{block.name}.{linear.name}", "singular_values": values, "output_energy": 1.0}
        for block in shapes_from_headers(folder).blocks
        for linear in block.compressible
    ]
    (emulator / "emulator.json").write_text(json.dumps({"linears": rows}))
    plan = plan_run(folder, GIB, max_length=16, batch_size=1, emulator=emulator, timing=False)
    error = plan.choices[0].error
    assert error is not None
    assert 0 <= error < 1
    (emulator / "emulator.json").write_text("{}")
    with pytest.raises(InputError, match="field linears"):
        plan_run(folder, GIB, emulator=emulator, timing=False)


def test_a_stored_copy_is_never_larger_than_the_matrix() -> None:
    for tokens, features, share in ((1000, 512, 0.125), (20, 512, 0.125), (1000, 8, 0.9)):
        assert stored_copy_bytes(tokens, features, share, 2) <= tokens * features * 2
    assert stored_copy_bytes(1000, 512, None, 2) == 1000 * 512 * 2


@pytest.mark.filterwarnings("ignore")
def test_predicted_peaks_are_within_a_tenth_of_measured_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script counts live tensors, so that what this process has computed before does not matter."""
    cases = ("small, stored whole", "small, sublayer 1/8", "small, layer 1/8")
    monkeypatch.setattr(sys, "argv", ["measure", "--json", *(f"--only={case}" for case in cases)])
    failed = measure.main()
    shown = capsys.readouterr()
    assert not failed, shown.out
    assert {row["step"] for row in json.loads(shown.out)} == {"compile", "train", "correct"}


def test_anchors_cost_a_reading_of_the_original_every_k_steps() -> None:
    shapes = decoder(256, 512, 6, 1000)
    planned = PlannedRun(2, 64, 8)
    memory = train_memory(shapes, emulator_bytes(shapes, 0.25), planned)
    model = shapes.parameters * shapes.value_bytes
    slow_disk = Speed(read_bytes_per_second=model / 100, flops_per_second=1e15, device="cpu")
    costs = {cost.every: cost for cost in anchor_costs(shapes, 0.25, planned, memory, slow_disk)}
    assert [cost.read_bytes_per_step for cost in costs.values()] == [model // every for every in costs]
    assert costs[10].seconds_per_step == pytest.approx(10, rel=0.05)
    rows, scales = 128 * shapes.hidden // 4, 2 * (128 + shapes.hidden)
    assert costs[10].offset_bytes == 10 * len(shapes.blocks) * (rows + scales)
    assert len({cost.peak_bytes for cost in costs.values()}) == 1
    assert costs[1].peak_bytes > memory.emulator + memory.adapter + shapes.largest_block_bytes
    assert all(cost.seconds_per_step is None for cost in anchor_costs(shapes, 0.25, planned, memory, None))
