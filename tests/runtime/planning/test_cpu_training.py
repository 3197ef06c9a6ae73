"""What training in half precision keeps on a CPU, where no autocast makes the copies that adapters read."""

import json
from pathlib import Path
from typing import Any

import torch

from helpers.tiny_models import save_tiny
from onelayer.runtime import train_lora
from onelayer.runtime.planning.read_shapes import shapes_from_headers
from onelayer.runtime.planning.train_memory import LayerBytes, PlannedRun

TOKENS = 64


def test_saved_activations_of_bfloat16_on_a_cpu_are_predicted(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", torch.bfloat16)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "the sum of two and three is five " * 20}) + "\n")
    settings: dict[str, Any] = {"max_steps": 1, "batch_size": 1, "max_length": TOKENS, "args": {"use_cpu": True}}
    measured = train_lora(tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "out", **settings)
    shapes = shapes_from_headers(tmp_path / "model")

    def predicted(on_gpu: bool) -> int:
        layers = LayerBytes(shapes, PlannedRun(1, TOKENS, on_gpu=on_gpu))
        return sum(count * layers.stored(block) for block, count in shapes.kinds)

    outside = measured.saved_activation_bytes - predicted(on_gpu=False)
    # The final norm, the loss, masks and rotary angles are outside of the layers.
    assert 0 <= outside <= 0.35 * measured.saved_activation_bytes
    assert predicted(on_gpu=True) < 0.9 * predicted(on_gpu=False)
