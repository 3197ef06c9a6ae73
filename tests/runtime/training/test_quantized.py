"""Training a quantized original: it streams, unpacked as it is read, and learns what the plain model learns."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import quantized_models as packers
from helpers.gguf_files import write_gguf
from helpers.training_rows import ROWS
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.compiler.storage.files import read_json
from onelayer.runtime import train_lora

QUICK: dict[str, Any] = {"max_steps": 2, "batch_size": 2, "lora_rank": 4, "target_modules": ["q_proj", "o_proj"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a mixture in FP8 with partial blocks, the same model unpacked, a GGUF file, and data."""
    root: Path = tmp_path_factory.mktemp("quantized")
    settings, packer = packers.fp8_settings(24, 20), packers.fp8_block(24, 20)
    truth = packers.save_quantized(root / "packed", "qwen3_moe", settings, packer, dtype=torch.float32)
    shutil.copytree(root / "packed", root / "plain")
    save_file({name: tensor.contiguous() for name, tensor in truth.items()}, root / "plain" / "model.safetensors")
    document = read_json(root / "plain" / "config.json")
    del document["quantization_config"]
    (root / "plain" / "config.json").write_text(json.dumps(document))
    write_gguf(root / "tiny.gguf")
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["text"]))
    return root


def train(place: Path, model: str, output: Path, **settings: Any) -> Any:
    return train_lora(place / model, place / "data.jsonl", output, **{**QUICK, **settings})


def test_it_learns_what_the_unpacked_model_learns(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = {name: train(place, name, tmp_path / name, way="streamed") for name in ("packed", "plain")}
    shown = capsys.readouterr().err
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in results)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert results["packed"].losses == results["plain"].losses
    packed, plain = (result.streamed for result in results.values())
    assert packed.bytes_read < 0.6 * plain.bytes_read
    values = Checkpoint.open(place / "packed").tensors.values()
    largest = max(info.size_bytes for info in values if info.dtype == "F8_E4M3")
    assert packed.workspace_bytes - plain.workspace_bytes > largest
    assert "trained on disk: fp8 weights are unpacked layer by layer; each batch reads" in shown
    assert "are quantized (fp8)" in (tmp_path / "packed" / "README.md").read_text()
    assert "are quantized" not in (tmp_path / "plain" / "README.md").read_text()


def test_a_gguf_file_is_trained(place: Path, tmp_path: Path) -> None:
    result = train(place, "tiny.gguf", tmp_path / "adapter")
    assert result.streamed.bytes_read > 0
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["base_model_name_or_path"].endswith("tiny.gguf")
    assert "are quantized (gguf)" in (tmp_path / "adapter" / "README.md").read_text()


def test_it_is_not_held_whole(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--way resident: .*packed has fp8 weights.*--way streamed --cache"):
        train(place, "packed", tmp_path / "adapter", way="resident")
    assert not (tmp_path / "adapter").exists()
