"""How often anchors are renewed, by the time that is given."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.model_shapes import decoder
from onelayer.compiler.errors import InputError
from onelayer.runtime.anchors.settings import ANCHOR_EVERY
from onelayer.runtime.planning.choice import USABLE_SHARE, best_ratio, limiting_pass
from onelayer.runtime.planning.pass_memory import renewal_bytes
from onelayer.runtime.planning.plan import PlanResult, plan_run
from onelayer.runtime.planning.speed import Speed
from onelayer.runtime.planning.train_memory import PlannedRun
from onelayer.runtime.planning.ways import choose_every
from onelayer.runtime.reporting.run_summaries import plan_summary

GIB = 1 << 30
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 32000}
CONFIG |= {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 32}
# Reading the original takes far longer than computing with it.
SLOW_DISK = Speed(read_bytes_per_second=1e7, flops_per_second=1e13, device="typed in")


def planned(folder: Path, steps: int | None, hours: float | None) -> PlanResult:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return plan_run(folder, 2 * GIB, max_steps=steps, hours=hours, speed=SLOW_DISK)


def test_renewals_are_as_frequent_as_time_allows_and_as_helps() -> None:
    def reading(every: int) -> float:
        return 60 / every

    chosen = choose_every(1.0, reading, 100, 1e9)
    assert (chosen.every, chosen.seconds) == (ANCHOR_EVERY, 700)
    chosen = choose_every(1.0, reading, 100, 401)
    assert chosen.every == 20
    assert choose_every(1.0, reading, 100, 160).every == 100
    none = choose_every(1.0, reading, 100, 159)
    assert (none.every, none.seconds) == (None, 100)
    assert choose_every(1.0, reading, 4, 1e9).every == 4


def test_a_plan_chooses_within_the_hours(tmp_path: Path) -> None:
    ample, scarce, nothing = (planned(tmp_path, 500, hours) for hours in (1e4, 3.0, 0.05))
    assert ample.anchor_choice is not None
    assert scarce.anchor_choice is not None
    assert nothing.anchor_choice is not None
    assert ample.anchor_choice.every == ANCHOR_EVERY
    assert scarce.anchor_choice.every is not None
    assert scarce.anchor_choice.every > ANCHOR_EVERY
    assert scarce.anchor_choice.seconds <= 3 * 3600
    assert nothing.anchor_choice.every is None
    texts = [plan_summary(plan.model_dump(mode="json")) for plan in (scarce, nothing)]
    assert f"with --anchor-every {scarce.anchor_choice.every}" in texts[0]
    assert "no anchors fit into 0.05 h" in texts[1]
    assert planned(tmp_path, None, None).anchor_choice is None
    for steps, hours in ((500, None), (None, 2.0), (500, 0.0)):
        with pytest.raises(InputError, match="--hours: chooses the anchors"):
            planned(tmp_path, steps, hours)
    with pytest.raises(InputError, match="--hours: needs weights"):
        plan_run(tmp_path, 2 * GIB, max_steps=5, hours=1.0)


def test_an_emulator_leaves_room_for_renewals() -> None:
    planned = PlannedRun(batch_size=1, max_length=256, where="layer", rank=1 / 16, refine_tokens=0, compile_tokens=256)
    shapes, memory_bytes = decoder(4096, 14336, 32, 128256), 5 << 30
    runs = [planned, replace(planned, anchored=True)]
    plain, anchored = (best_ratio(shapes, run, memory_bytes, "nf4") for run in runs)
    assert 0 < anchored.reached < plain.reached
    held = [renewal_bytes(shapes, choice.memory, choice.planned) for choice in (anchored, plain)]
    assert held[0] <= USABLE_SHARE * memory_bytes < held[1]
    assert limiting_pass(shapes, anchored, memory_bytes).startswith("train: a layer of the original")
