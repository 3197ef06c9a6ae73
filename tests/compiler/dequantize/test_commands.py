"""Every command on a quantized original: what it makes is what it would make of the unpacked model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import quantized_models as packers
from helpers.peft_adapters import load_adapter, load_original, random_adapter
from helpers.tiny_models import CORPUS
from onelayer.compiler import (
    compile_emulator,
    correct_adapter,
    evaluate_model,
    inspect_path,
    merge_adapter,
    polish_adapter,
    refine_emulator,
)
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.compiler.storage.files import read_json
from onelayer.runtime import plan_run

SETTINGS: dict[str, Any] = {"max_length": 16, "device": "cpu"}


class Project:
    """A mixture in FP8 with partial blocks, the same model unpacked, data, and an adapter."""

    def __init__(self, root: Path) -> None:
        self.packed, self.plain = root / "packed", root / "plain"
        truth = packers.save_quantized(
            self.packed, "qwen3_moe", packers.fp8_settings(24, 20), packers.fp8_block(24, 20)
        )
        shutil.copytree(self.packed, self.plain)
        save_file({name: tensor.contiguous() for name, tensor in truth.items()}, self.plain / "model.safetensors")
        document = read_json(self.plain / "config.json")
        del document["quantization_config"]
        (self.plain / "config.json").write_text(json.dumps(document))
        self.data = root / "data.jsonl"
        self.data.write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS * 2))
        self.adapter = root / "adapter"
        random_adapter(load_original(self.plain), self.adapter, size=0.05, r=2, target_modules=["q_proj", "o_proj"])

    def models(self) -> dict[str, Path]:
        return {"packed": self.packed, "plain": self.plain}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("quantized"))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def assert_equal(left: Path, right: Path) -> None:
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_the_whole_loop_gives_what_the_unpacked_model_gives(project: Project, tmp_path: Path) -> None:
    losses = {}
    for name, model in project.models().items():
        out = tmp_path / name
        out.mkdir()
        compile_emulator(model, project.data, out / "emulator", ratio=0.5, samples=4, **SETTINGS)
        refine_emulator(
            out / "emulator",
            model=model,
            calibration=project.data,
            output=out / "refined",
            steps=2,
            samples=4,
            **SETTINGS,
        )
        correct_adapter(project.adapter, emulator=out / "emulator", model=model, output=out / "corrected")
        polish_adapter(
            project.adapter, model=model, data=project.data, output=out / "polished", steps=1, batch_size=4, **SETTINGS
        )
        losses[name] = evaluate_model(model, project.data, adapters=[out / "corrected"], **SETTINGS)
    for made in ("emulator", "refined", "corrected", "polished"):
        assert_equal(tmp_path / "packed" / made, tmp_path / "plain" / made)
    ours, theirs = ([score.loss for score in losses[name].results] for name in ("packed", "plain"))
    assert ours == theirs
    assert (
        read_json(tmp_path / "packed" / "emulator" / "config.json")["quantization_config"]["quant_method"] == "onelayer"
    )
    for adapter in ("corrected", "polished"):
        assert "are quantized (fp8)" in (tmp_path / "packed" / adapter / "README.md").read_text()
        assert "are quantized" not in (tmp_path / "plain" / adapter / "README.md").read_text()


def test_promises_count_what_is_unpacked_and_reading_counts_what_is_stored(project: Project) -> None:
    packed, plain = (evaluate_model(model, project.data, **SETTINGS).report for model in project.models().values())
    assert packed.largest_unit_bytes == plain.largest_unit_bytes
    stored = max(
        info.size_bytes for name, info in Checkpoint.open(project.packed).tensors.items() if info.dtype == "F8_E4M3"
    )
    assert packed.workspace_bytes - plain.workspace_bytes > stored
    assert packed.bytes_read < 0.75 * plain.bytes_read


def test_a_merge_is_plain_and_what_peft_merges(project: Project, tmp_path: Path, capsys: Any) -> None:
    result = merge_adapter(project.adapter, model=project.packed, output=tmp_path / "merged")
    assert "fp8 weights are unpacked" in capsys.readouterr().err
    merged = weights(tmp_path / "merged")
    stored = weights(project.plain)
    assert merged.keys() == stored.keys()  # experts by their stored names
    wanted = load_adapter(load_original(project.plain, torch.bfloat16), project.adapter).merge_and_unload().state_dict()
    changed = [name for name, tensor in merged.items() if not torch.equal(tensor, stored[name])]
    assert len(changed) == result.changed == 4
    for name in changed:
        torch.testing.assert_close(merged[name], wanted[name], rtol=1e-2, atol=1e-6)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert "quantization_config" not in read_json(tmp_path / "merged" / "config.json")
    assert result.unpacked + result.changed + result.copied == len(merged)
    assert load_original(tmp_path / "merged", torch.bfloat16) is not None


def test_plan_reads_packed_headers(project: Project) -> None:
    packed, plain = (plan_run(model, 1 << 30, max_length=16) for model in project.models().values())
    stored = sum(info.size_bytes for info in Checkpoint.open(project.packed).tensors.values())
    assert packed.predicted.read_bytes == packed.predicted.model_bytes == stored < plain.predicted.read_bytes
    assert packed.predicted.emulator_bytes == plain.predicted.emulator_bytes
    assert packed.predicted.compile_bytes == plain.predicted.compile_bytes


def test_inspect_names_the_method(project: Project) -> None:
    assert inspect_path(project.packed)["quantization"] == "fp8"
    assert inspect_path(project.plain)["quantization"] is None
