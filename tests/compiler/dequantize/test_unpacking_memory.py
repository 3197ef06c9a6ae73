"""What unpacking a weight holds, measured in fresh processes: the weight, what is stored of it, and some slices."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers import quantized_models as packers
from helpers.children import fork_server
from helpers.gguf_files import write_gguf
from onelayer.compiler.dequantize.checkpoint import unpacked
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.storage.checkpoint import Checkpoint, resolve_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
MIB = 1 << 20
COLUMNS = 3200
# Rows of the weight that is measured, and of one that is read before: first uses take memory once.
ROWS, FEW_ROWS = 2496, 64
Tensors = dict[str, torch.Tensor]


def fp8(name: str, rows: int) -> Tensors:
    scales = torch.ones(-(-rows // 128), COLUMNS // 128)
    return {f"{name}.weight": torch.ones(rows, COLUMNS).to(torch.float8_e4m3fn), f"{name}.weight_scale_inv": scales}


def gptq(name: str, rows: int) -> Tensors:
    values, zeros = torch.ones(COLUMNS // 8, rows).int(), torch.ones(25, rows // 8).int()
    parts = {"qweight": values, "qzeros": zeros, "scales": torch.ones(25, rows).half()}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def int4(name: str, rows: int) -> Tensors:
    words = torch.full((rows, COLUMNS // 8), 0x11111111, dtype=torch.int32)
    scales = torch.ones(rows, COLUMNS // 16, dtype=torch.bfloat16)
    parts = {"weight_packed": words, "weight_scale": scales, "weight_shape": torch.tensor([rows, COLUMNS])}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def mxfp4(name: str, rows: int) -> Tensors:
    blocks = torch.full((4, rows // 4, COLUMNS // 32, 16), 17, dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": torch.full(blocks.shape[:3], 127, dtype=torch.uint8)}


FORMATS: dict[str, tuple[dict[str, Any], Callable[[str, int], Tensors]]] = {
    "fp8": (packers.fp8_settings(128, 128), fp8),
    "gptq": (packers.gptq_settings(4, 128), gptq),
    "mxfp4": ({"quant_method": "mxfp4"}, mxfp4),
    "int4": (
        packers.compressed_settings("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16),
        int4,
    ),
}


def most_held(work: Callable[[], object]) -> int:
    """Return the most memory that `work` takes, in bytes, by the kernel's own mark.

    `work` is over in milliseconds: a thread that looks now and then may not see it, on a busy machine above all.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is held now
    before = high_water_bytes()
    work()
    return high_water_bytes() - before


def high_water_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) << 10


def read_here(path: Path) -> None:
    """Read a small weight and then a large one, of a checkpoint or of the GGUF file that lies there."""
    torch.set_num_threads(1)
    if (file := path / "model.gguf").is_file():
        os.environ["ONELAYER_HOME"] = str(path / "home")
        checkpoint: Checkpoint = StreamedModel(resolve_model(file)).checkpoint
    else:
        checkpoint = unpacked(Checkpoint.open(path), json.loads((path / "config.json").read_text()), "BF16")
    packed = [info for info in checkpoint.tensors.values() if len(info.shape) > 1]
    small, *_, large = sorted(packed, key=lambda info: info.size_bytes)
    checkpoint.read(small.name)
    peak = most_held(lambda: checkpoint.read(large.name))
    (path / "report.json").write_text(json.dumps([peak, large.size_bytes, checkpoint.unpacking_bytes]))


@pytest.mark.parametrize("name", FORMATS)
def test_unpacking_stays_within_its_promise(name: str, tmp_path: Path) -> None:
    settings, make = FORMATS[name]
    save_file({**make("large", ROWS), **make("small", FEW_ROWS)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    check_promise(tmp_path)


def test_unpacking_of_a_gguf_file_stays_within_its_promise(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", num_hidden_layers=1, intermediate_size=1 << 18)
    check_promise(tmp_path)


def check_promise(path: Path) -> None:
    process = fork_server().Process(target=read_here, args=(path,))
    process.start()
    process.join()
    peak, weight, promised = json.loads((path / "report.json").read_text())
    assert peak > weight > 15 * MIB
    assert peak <= weight + promised
