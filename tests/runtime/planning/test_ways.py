"""The ways to train, compared for a model, rows, a disk, and memory of card and host."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from helpers.model_shapes import decoder, mixture
from onelayer.runtime.modules.block_speed import block_flops_per_second
from onelayer.runtime.planning.choice import choose
from onelayer.runtime.planning.shapes import ModelShapes
from onelayer.runtime.planning.speed import Seconds, Speed, seconds_at
from onelayer.runtime.planning.train_memory import PlannedRun, active_values, factor_values
from onelayer.runtime.planning.ways import WayCost, anchor_seconds, fastest_way, way_costs

GIB = 1 << 30
LLAMA_8B = decoder(4096, 14336, 32, 128256, narrow=1024)
CARD = 50e12


def ways(
    shapes: ModelShapes, memory: int, *, host: int | None = None, disk: float = 3.5e9, rows: int = 8
) -> dict[str, WayCost]:
    planned, speed = PlannedRun(rows, 512), Speed(read_bytes_per_second=disk, flops_per_second=CARD, device="typed in")
    best = choose(shapes, planned, memory, "nf4")
    seconds = seconds_at(speed, shapes, best.planned, ratio=best.ratio or 0.1, samples=64, polish_batch=64)
    return {way.way: way for way in way_costs(shapes, best, memory, host, speed, seconds)}


def test_a_step_takes_the_slower_of_reading_and_computing() -> None:
    stored, tokens = LLAMA_8B.stored_bytes, 8 * 512
    slow, fast = (ways(LLAMA_8B, 12 * GIB, disk=disk)["streamed"] for disk in (1e9, 1e12))
    assert slow.read_bytes_per_step == fast.read_bytes_per_step == 2 * stored
    assert slow.seconds_per_step == pytest.approx(2 * stored / 1e9, rel=0.05)
    multiplied = LLAMA_8B.parameters - 128256 * 4096  # all but the embedding
    assert fast.seconds_per_step == pytest.approx(6 * multiplied * tokens / CARD, rel=0.05)
    larger = ways(LLAMA_8B, 12 * GIB, disk=1e9, rows=32)["streamed"]
    assert larger.seconds_per_step == slow.seconds_per_step  # four times the rows in one reading


def test_factors_train_at_a_rate_of_their_own() -> None:
    quick = Speed(read_bytes_per_second=1e9, flops_per_second=CARD, device="typed in")
    slow = quick.model_copy(update={"factor_flops_per_second": CARD / 4})

    def seconds(speed: Speed, coded: bool) -> Seconds:
        planned = PlannedRun(8, 512, coded=coded)
        return seconds_at(speed, LLAMA_8B, planned, ratio=0.12, samples=64, polish_batch=64)

    def renewal(speed: Speed, coded: bool) -> float:
        return anchor_seconds(LLAMA_8B, 0.12, PlannedRun(8, 512, coded=coded), speed, 1000)

    factors = seconds(slow, coded=False)
    # The head is whole.
    narrow = factor_values(LLAMA_8B, 0.12)
    linears = sum(linear.parameters for block in LLAMA_8B.blocks for linear in block.compressible)
    assert narrow == pytest.approx(0.12 * linears, rel=0.01)
    assert factor_values(LLAMA_8B, 1.0) == 0
    slower = 1 + 3 * narrow / active_values(LLAMA_8B, 0.12)
    assert factors.train_step == pytest.approx(slower * seconds(quick, coded=False).train_step, rel=0.05)
    assert factors.polish_step == seconds(quick, coded=False).polish_step
    assert renewal(slow, coded=False) > renewal(quick, coded=False)
    assert seconds(slow, coded=True) == seconds(quick, coded=True)
    assert renewal(slow, coded=True) == renewal(quick, coded=True)


def test_measuring_a_block_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    rate = partial(block_flops_per_second, torch.device("cpu"), torch.float32, width=64)
    assert rate(tokens=16, factored=True) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_the_host_keeps_what_fits_and_a_step_reads_the_rest() -> None:
    without, some, all_of_it = (ways(LLAMA_8B, 12 * GIB, host=host)["streamed"] for host in (None, 8 * GIB, 64 * GIB))
    assert without.cache_bytes == 0
    assert 0 < some.cache_bytes < 8 * GIB
    assert some.read_bytes_per_step == pytest.approx(2 * (LLAMA_8B.stored_bytes - some.cache_bytes), abs=2)
    assert (all_of_it.cache_bytes, all_of_it.read_bytes_per_step) == (LLAMA_8B.unpacked_bytes, 0)
    packed = replace(LLAMA_8B, packed_bytes=LLAMA_8B.unpacked_bytes // 4)
    kept = ways(packed, 12 * GIB, host=8 * GIB)["streamed"]
    # Layers are kept as they are unpacked, so the same memory spares a quarter of the reading.
    assert 2 * packed.stored_bytes - kept.read_bytes_per_step == pytest.approx(kept.cache_bytes / 2, abs=8)


def test_the_fastest_way_follows_from_memory_disk_and_steps() -> None:
    small = decoder(1024, 2816, 16, 32000)
    assert fastest_way(list(ways(small, 24 * GIB).values()), 100) == "resident"
    tight = ways(LLAMA_8B, 8 * GIB, disk=1e9)
    assert not tight["resident"].fits
    assert tight["streamed"].fits
    assert tight["emulator"].fits
    assert fastest_way(list(tight.values()), None) == "emulator"
    once = {name: tight[name].once_seconds or 0 for name in ("anchored", "emulator")}
    assert 0 < once["anchored"] < once["emulator"]  # only the latter is refined
    # An exact step is done before an emulator is compiled, and a few with anchors before one is refined.
    assert [fastest_way(list(tight.values()), steps) for steps in (1, 3)] == ["streamed", "anchored"]
    assert fastest_way(list(tight.values()), 10_000) == "emulator"
    assert fastest_way([way.model_copy(update={"fits": False}) for way in tight.values()], None) is None
    assert fastest_way([way.model_copy(update={"seconds_per_step": None}) for way in tight.values()], 3) is None


def test_of_ways_that_are_as_fast_the_exact_one_is_named() -> None:
    def way(name: str) -> WayCost:
        document = {"way": name, "fits": True, "peak_bytes": 1, "read_bytes_per_step": 0, "once_seconds": 0.0}
        return WayCost.model_validate({**document, "seconds_per_step": 2.0})

    assert fastest_way([way("streamed"), way("anchored"), way("emulator")], 10) == "streamed"


def test_a_quantized_original_is_not_held_and_a_mixture_computes_little() -> None:
    packed = replace(decoder(1024, 2816, 16, 32000), packed_bytes=100_000_000)
    assert not ways(packed, 24 * GIB)["resident"].fits
    experts = mixture(2048, 1024, 16, 32000, experts=32, per_token=2)
    step = ways(experts, 12 * GIB, disk=1e12)["streamed"].seconds_per_step
    assert step is not None
    assert step < 6 * experts.parameters * 8 * 512 / CARD / 4


def test_a_larger_batch_holds_more_of_its_loss() -> None:
    few, many = (ways(LLAMA_8B, 12 * GIB, rows=rows)["streamed"].peak_bytes for rows in (8, 64))
    assert 24 * 56 * 512 * 4096 >= many - few > 10 * 56 * 512 * 4096


def test_anchors_take_a_smaller_emulator() -> None:
    tight = ways(LLAMA_8B, 8 * GIB)
    assert tight["anchored"].fits
    assert tight["anchored"].peak_bytes <= 0.95 * 8 * GIB
