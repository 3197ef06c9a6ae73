"""A manifest whose model is one GGUF file: planned by its header, then trained and scored."""

import json
from pathlib import Path

import pytest

from helpers.gguf_files import write_gguf
from helpers.training_rows import ROWS
from onelayer.compiler.storage.files import read_json
from onelayer.compiler.storage.gguf_format import read_gguf_header
from onelayer.runtime.manifest.manifest import load_manifest
from onelayer.runtime.pipeline.plan import plan
from onelayer.runtime.pipeline.run import run
from onelayer.runtime.store.store import ArtifactStore

pytest.importorskip("gguf")
MANIFEST = """
version: 1
model: {path: tiny.gguf}
train: {on: original, lora: {r: 2}, args: {max_steps: 1, per_device_train_batch_size: 2}}
tasks:
  sql: {train: rows.jsonl, test: rows.jsonl}
"""


def test_a_file_is_planned_trained_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONELAYER_HOME", str(tmp_path / "home"))
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["text"][:4]))
    (tmp_path / "manifest.yaml").write_text(MANIFEST)
    manifest, store = load_manifest(tmp_path / "manifest.yaml"), ArtifactStore()
    planned = {step.name: step for step in plan(manifest, store).steps}
    stored = sum(info.size_bytes for info in read_gguf_header(tmp_path / "tiny.gguf")[0].values())
    assert planned["sql.evaluate"].read_bytes == stored
    done = {step.name: step for step in run(manifest, store).steps}
    adapter = Path(done["sql.direct"].path or "")
    assert read_json(adapter / "adapter_config.json")["base_model_name_or_path"].endswith("tiny.gguf")
    assert read_json(adapter / "onelayer.json")["training"]["streamed"]["bytes_read"] > 0
    assert [step.state for step in run(manifest, store).steps] == ["cached", "cached"]
