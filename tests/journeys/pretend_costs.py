"""What passes cost a pretend accelerator: waits and transfers per unit and batch, float64 products, exact peaks."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP

from helpers import pretend_device
from helpers.peft_adapters import load_original, random_adapter
from helpers.pretend_counts import COUNTS
from helpers.pretend_runs import (
    Pass,
    coded,
    compiled,
    corrected,
    evaluated,
    polished,
    prepared,
    refined,
    weighed,
)
from helpers.resident_gradients import with_lora
from onelayer.compiler.codes import residual
from onelayer.compiler.codes.encode import encode
from onelayer.compiler.codes.forms import CodeShape
from onelayer.compiler.compile import coded as coding
from onelayer.compiler.correct import choose
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.factors.factorize import factorize
from onelayer.compiler.factors.moments import Moments
from onelayer.compiler.factors.quantize import quantize_matrix
from onelayer.compiler.machine.devices import forked_random
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.unit_memory import RESERVE_BYTES
from onelayer.compiler.refine.job import UnitTraining
from onelayer.runtime.anchors.anchors import Anchors
from onelayer.runtime.modules.coded_linear import CodedLinear
from onelayer.runtime.modules.low_rank_linear import load_emulator
from onelayer.runtime.modules.quantized_linear import Quantization, QuantizedLinear
from onelayer.runtime.reporting.tables import report_line

# A table of levels that bitsandbytes keeps, and a counter.
SMALL_BYTES = 512


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors can lie on the pretend device."""
    pretend_device.patch(monkeypatch)


# Waits, transfers, and transfers that block, which one more batch costs in each unit. A unit takes four tensors up and
# gives one back, for which the host waits. Refinement does so once, and takes inputs and targets up again for errors
# before and after. An exact step also takes inputs and a gradient up and gives a gradient back.
PER_UNIT_AND_BATCH: dict[Pass, tuple[int, int, int]] = {
    compiled: (1, 5, 0),
    refined: (1, 15, 0),
    evaluated: (1, 5, 0),
    polished: (2, 11, 0),
}
# Transfers of the nine parameters of a unit, forward and back; none blocks.
PER_UNIT: dict[Pass, int] = {compiled: 9, refined: 9, evaluated: 9, polished: 18}
LOADED = "stored_weights.py"


def costs(run: Pass, path: Path) -> tuple[tuple[int, int, int], int]:
    """Count the waits, transfers and blocking transfers of one pass, and its transfers of weights that do not block."""
    COUNTS.reset()
    run(path)
    blocking = sum(count for (kind, _), count in COUNTS.transfers.items() if "blocking" in kind)
    loaded = sum(
        count for (kind, line), count in COUNTS.transfers.items() if line.startswith(LOADED) and "blocking" not in kind
    )
    return (sum(COUNTS.waits.values()), sum(COUNTS.transfers.values()), blocking), loaded


@pytest.mark.usefixtures("pretend")
def test_a_batch_costs_each_unit_a_fixed_number_of_waits_and_transfers(tmp_path: Path) -> None:
    found = dict[tuple[Pass, int, int], tuple[tuple[int, int, int], int]]()
    for layers in (1, 2):
        for rows in (3, 4):
            path = prepared(tmp_path / f"{layers}-{rows}", layers, rows)
            found |= {(run, layers, rows): costs(run, path) for run in PER_UNIT_AND_BATCH}
    for run, expected in PER_UNIT_AND_BATCH.items():
        of_one, of_two = (
            [more - fewer for more, fewer in zip(found[run, layers, 4][0], found[run, layers, 3][0], strict=True)]
            for layers in (1, 2)
        )
        assert tuple(two - one for one, two in zip(of_one, of_two, strict=True)) == expected, run.__name__
        assert found[run, 2, 3][1] - found[run, 1, 3][1] == PER_UNIT[run], run.__name__


class ThreeMLPs(torch.nn.Module):
    """Three in place of one, so that a layer has 13 linears instead of 7."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(LlamaMLP(config) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([part(x) for part in self.parts]).sum(dim=0)


# Waits of passes over one layer and three batches, however many linears it has. All wait for the device that is picked
# and for each batch in each unit that it runs through: the layer, and the norm after it where a loss is taken; in a
# correction for four variants of each batch. A way back waits for it twice in the layer and, for gradients at the head,
# twice. The others are counts of rows that are not finite, what is stored and what stays as it is (compile); the loss;
# errors before and after, the sizes of factors, and what is stored (refine); scores; gaps in the span of the adapter,
# what linears read, and gaps outside (correct); the gradient's norm, the state that is saved, and the adapter (polish).
WAITS: dict[Pass, int] = {compiled: 7, weighed: 20, coded: 20, refined: 8, evaluated: 8, corrected: 29, polished: 20}
# Each full eigenproblem waits for its own kernel, which looks for failures, and each cycle of an iteration once more.
SOLVER = ("subspace.py:_read",)


def waits(run: Pass, path: Path) -> tuple[int, int]:
    """Count the waits of one pass: those of eigenproblems and of iterations, which each linear has, and all others."""
    COUNTS.reset()
    run(path)
    solving = sum(n for (kind, line), n in COUNTS.waits.items() if kind == "_linalg_eigh" or line in SOLVER)
    return sum(COUNTS.waits.values()) - solving, solving


@pytest.mark.usefixtures("pretend")
def test_passes_decide_once_a_unit_whatever_the_number_of_linears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (coding, residual):  # bitsandbytes takes seconds for nf4 on a device that it does not know
        monkeypatch.setattr(module, "RESIDUAL_DTYPE", "int8")
    monkeypatch.setattr(choose, "CANDIDATES", (("span", 0.0, 1.0), ("span", None, 1.0), ("oblique", None, 1.0)))
    found = dict[Any, dict[Pass, tuple[int, int]]]()
    for kind in (LlamaMLP, ThreeMLPs):
        monkeypatch.setattr(modeling_llama, "LlamaMLP", kind)
        path, wide = (
            prepared(tmp_path / f"{kind.__name__}-{name}", 1, 3, **shape)
            for name, shape in (("narrow", {}), ("wide", {"hidden_size": 128, "num_key_value_heads": 4}))
        )
        random_adapter(load_original(path / "model"), path / "adapter", size=0.1, r=2, target_modules="all-linear")
        found[kind] = {run: waits(run, wide if run is coded else path) for run in WAITS}
    for kind, linears in ((LlamaMLP, 7), (ThreeMLPs, 13)):
        assert {run: own for run, (own, _) in found[kind].items()} == WAITS, kind.__name__
        assert found[kind][compiled][1] == linears


@pytest.mark.usefixtures("pretend")
def test_refinement_keeps_calls_on_the_device_where_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prepared(tmp_path, 1, 4, hidden_size=64, intermediate_size=160)
    compiled(path)
    uploads, promised = {}, UnitTraining._promised_bytes
    for steps, room in ((4, 1), (8, 1), (4, 0), (8, 0)):
        monkeypatch.setattr(UnitTraining, "_promised_bytes", promised if room else lambda training: 0)
        COUNTS.reset()
        report = refined(path, steps=steps)
        assert report.peak_device_bytes <= report.largest_unit_bytes + report.workspace_bytes - RESERVE_BYTES
        uploads[steps, room] = sum(count for (kind, _), count in COUNTS.transfers.items() if kind == "to device")
    # Steps 1 and 2 are a round through all calls; each step takes up two calls of five tensors unless they are there.
    assert uploads[8, 0] - uploads[4, 0] == 4 * 2 * 5
    assert uploads[8, 1] == uploads[4, 1] < uploads[4, 0]


@pytest.mark.usefixtures("pretend")
def test_the_peak_does_not_grow_with_layers_or_samples_and_is_promised(tmp_path: Path) -> None:
    peaks = []
    for layers, rows in ((1, 3), (2, 3), (1, 6)):
        path = prepared(tmp_path / f"{layers}-{rows}", layers, rows, hidden_size=64, intermediate_size=160)
        report = compiled(path)
        assert report.peak_device_bytes <= report.largest_unit_bytes + report.workspace_bytes - RESERVE_BYTES
        peaks.append(report.peak_device_bytes)
    assert max(peaks) - min(peaks) < SMALL_BYTES


@pytest.mark.usefixtures("pretend")
def test_anchoring_holds_no_more_the_more_batches_wait_and_is_promised(tmp_path: Path) -> None:
    path = prepared(tmp_path, 2, 4, hidden_size=64, intermediate_size=160)
    compiled(path)
    adapted = with_lora(load_emulator(path / "emulator")).to("pretend")
    batch = {name: torch.ones(2, 12, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    peaks = []
    with Meter(torch.device("pretend")) as meter:
        facts = Emulator.open(path / "emulator").facts
        anchors = Anchors(adapted, facts, path / "model", 2, meter, nullcontext)
        for batches in (2, 8):
            COUNTS.reset()
            before = COUNTS.allocated_bytes
            anchors.renew([batch] * batches)
            peaks.append(COUNTS.peak_bytes - before)
        report = anchors.report(every=8)
    assert report.offset_bytes > 0
    assert peaks[1] - peaks[0] < SMALL_BYTES
    assert peaks[1] <= report.largest_unit_bytes + report.workspace_bytes - RESERVE_BYTES


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize("rank", [40, 128])
def test_linears_that_are_not_small_are_solved_without_float64(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    W, scales = torch.randn(256, 256, generator=generator) / 16, torch.arange(1, 257) ** -0.5
    X = (torch.randn(600, 256, generator=generator) * scales) @ torch.randn(256, 256, generator=generator)
    figures = []
    for device in ("cpu", "pretend"):
        moments = Moments.empty((256, 256), True, torch.device(device), torch.float32)
        moments.add(X.to(device), None)
        COUNTS.reset()
        figures.append(factorize(W.to(device), moments, rank, torch.float32).figures.error)
    assert not COUNTS.double_products
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


@pytest.mark.usefixtures("pretend")
def test_codes_hold_one_decoded_weight_more_than_nf4() -> None:
    shape, code, quantization = (256, 384), CodeShape(2, 4), Quantization("nf4", torch.float32)
    W, peaks = torch.randn(shape), []
    codes, codebook = encode(W, torch.eye(shape[1])[None], code).packed()
    common: dict[str, Any] = {"in_features": shape[1], "out_features": shape[0], "bias": False}
    for linear, tensors in (
        (QuantizedLinear(None, quantization, **common), [quantize_matrix(W, "nf4")]),
        (CodedLinear(code, None, quantization, **common), [codes, codebook]),
    ):
        for name, tensor in zip(linear.factors, tensors, strict=True):
            linear.get_parameter(name).data = tensor
        x = torch.randn(8, shape[1]).to("pretend").requires_grad_()
        linear.to("pretend")(x[:1]).sum().backward()  # libraries keep tables
        COUNTS.reset()
        before = COUNTS.allocated_bytes
        linear(x).sum().backward()
        peaks.append(COUNTS.peak_bytes - before)
    weight_bytes = 4 * W.numel()
    assert weight_bytes < peaks[1] <= peaks[0] + weight_bytes
    # What is decoded, a window and a number that is looked up for every two values, and the activations.
    assert peaks[1] <= weight_bytes + 5 * W.numel() // 2 + 3 * 4 * 8 * sum(shape)


@pytest.mark.usefixtures("pretend")
def test_what_the_allocator_keeps_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COUNTS, "max_memory_reserved", lambda device: 3 * COUNTS.peak_bytes, raising=False)
    report = compiled(prepared(tmp_path, 1, 2))
    assert report.reserved_device_bytes == 3 * report.peak_device_bytes
    assert "expandable_segments" in report_line(report.model_dump(mode="json"))
    less = report.model_copy(update={"reserved_device_bytes": report.peak_device_bytes})
    assert "expandable_segments" not in report_line(less.model_dump(mode="json"))


@pytest.mark.usefixtures("pretend")
def test_random_numbers_of_any_accelerator_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"now": torch.tensor([1])}
    monkeypatch.setattr(COUNTS, "get_rng_state", lambda device: state["now"], raising=False)
    monkeypatch.setattr(COUNTS, "set_rng_state", lambda value, device: state.update(now=value), raising=False)
    for device in (None, torch.device("pretend:0")):
        with forked_random(device):
            state["now"] = torch.tensor([2])
        assert state["now"].tolist() == [1]
