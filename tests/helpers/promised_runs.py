"""Passes in fresh processes: a model and data in a folder in, the report of what was promised and measured out."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import torch

from helpers.children import fork_server
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.polish.command import polish_adapter
from onelayer.compiler.refine.command import refine_emulator
from onelayer.compiler.results import Report
from onelayer.compiler.sampling.command import sample_pictures
from onelayer.runtime.anchors.anchors import Anchors
from onelayer.runtime.modules.low_rank_linear import load_emulator


def data_in(root: Path) -> Path:
    """Return the rows in `root`, or the encoded images."""
    return root / "images" if (root / "images").exists() else root / "data.jsonl"


def compiled(root: Path, **settings: Any) -> Report:
    """Compile the model in `root` on the data there."""
    given = {"host_memory_bytes": 0, "ratio": 0.2, **settings}
    return compile_emulator(root / "model", data_in(root), root / "emulator", **given).report


def refined(root: Path, **settings: Any) -> Report:
    """Refine the emulator that `compiled` made."""
    given = {"model": root / "model", "calibration": data_in(root), "steps": 2, **settings}
    return refine_emulator(root / "emulator", output=root / "refined", host_memory_bytes=0, **given).report


def polished(root: Path, **settings: Any) -> Report:
    """Make a fresh adapter."""
    given = {"model": root / "model", "data": data_in(root), "lora_rank": 8, "steps": 1, **settings}
    return polish_adapter(None, output=root / "polished", host_memory_bytes=0, **given).report


def anchored(root: Path, batches: int, rows: int, tokens: int) -> Report:
    """Find the offsets of some batches for the emulator that `compiled` made, with a fresh adapter."""
    adapted = peft.get_peft_model(load_emulator(root / "emulator"), peft.LoraConfig(r=4, target_modules="all-linear"))
    ids = torch.ones(rows, tokens, dtype=torch.long)
    with Meter(torch.device("cpu")) as meter:
        anchors = Anchors(adapted, Emulator.open(root / "emulator").facts, root / "model", 2, meter, nullcontext)
        anchors.renew([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * batches)
        found = anchors.report(every=batches)
        assert found.offset_bytes > 0
        return meter.report(found.largest_unit_bytes, found.workspace_bytes, found.bytes_read)


def sampled(root: Path, **settings: Any) -> Report:
    """Draw a picture with the pipeline in `root`."""
    return sample_pictures(root / "model", "a dog", root / "samples", steps=2, **settings).report


def _run_here(command: Callable[..., Report], root: Path, settings: dict[str, Any], home: str) -> None:
    """Run a command in this process."""
    os.environ["ONELAYER_HOME"] = home
    torch.set_num_threads(1)
    (root / "report.json").write_text(command(root, **settings).model_dump_json())


def measured(command: Callable[..., Report], root: Path, home: Path, **settings: Any) -> Report:
    """Measure in a child process: one that has computed before holds free memory, which would hide new allocations."""
    (root / "report.json").unlink(missing_ok=True)
    context = fork_server()
    process = context.Process(target=_run_here, args=(command, root, settings, str(home)))
    process.start()
    process.join()
    return Report.model_validate_json((root / "report.json").read_text())


def check_promise(report: Report) -> None:
    """Assert that a peak is within what was promised."""
    assert report.peak_device_bytes <= report.largest_unit_bytes + report.workspace_bytes
