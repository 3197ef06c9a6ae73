"""Step functions that write the same kinds of files as the real ones in a millisecond, and a project that runs them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import save_file

import onelayer.compiler
import onelayer.runtime
from onelayer.runtime.manifest.manifest import Manifest, load_manifest
from onelayer.runtime.pipeline.plan import plan
from onelayer.runtime.pipeline.run import run
from onelayer.runtime.store.store import ArtifactStore

REPORT = {
    "largest_unit_bytes": 1,
    "workspace_bytes": 2,
    "peak_device_bytes": 3,
    "peak_host_bytes": 4,
    "bytes_read": 5,
    "seconds": 0.1,
}
MANIFEST = """
version: 1
model: {path: model}
emulator: {calibration: {data: mix.jsonl}, ratio: 0.25}
train: {lora: {r: 8}, args: {learning_rate: 1e-4, max_steps: 5}}
tasks:
  sql: {train: sql.jsonl, test: test.jsonl}
  support: {train: support.jsonl}
"""


class Document(BaseModel):
    model_config = ConfigDict(extra="allow")

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)


def write_model(folder: Path, content: str) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "fake"}))
    save_file({"weight": numpy.frombuffer(content.encode(), dtype=numpy.uint8)}, folder / "model.safetensors")


def write_adapter(folder: Path, content: str) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"weight": numpy.frombuffer(content.encode(), dtype=numpy.uint8)}, folder / "adapter_model.safetensors")


def content_of(folder: Path, name: str) -> str:
    return (folder / name).read_bytes().hex()


class FakeSteps:
    """The replacements of the step functions; `calls` lists what ran, `fail` names unusable training data."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fail: dict[str, BaseException] = {}
        self.arguments: dict[str, dict[str, Any]] = {}
        self.data: dict[str, Any] = {}
        for name in (
            "compile_emulator",
            "slice_emulator",
            "refine_emulator",
            "correct_adapter",
            "polish_adapter",
            "merge_adapter",
            "evaluate_model",
            "reference_scores",
        ):
            monkeypatch.setitem(onelayer.compiler.__dict__, name, getattr(self, name))
        monkeypatch.setitem(onelayer.runtime.__dict__, "train_lora", self.train_lora)

    def taken(self) -> list[str]:
        """Return the calls since the last time."""
        calls, self.calls = self.calls, []
        return calls

    def compile_emulator(self, model: str, calibration: Sequence[str], output: Path, **settings: Any) -> Document:
        """The emulator depends on the model, the settings and the first line of each calibration file only."""
        self.calls.append("compile")
        self.arguments["compile"] = settings
        lines = [Path(data).read_text().splitlines()[0] for data in calibration]
        decisive = {name: settings[name] for name in ("ratio", "samples", "seed")}
        write_model(output, f"{lines} {decisive} {content_of(Path(model), 'model.safetensors')}")
        (output / "emulator.json").write_text(json.dumps({"seconds": len(self.calls)}))
        return Document(report=REPORT)

    def slice_emulator(self, emulator: Path, *, ratio: float, output: Path) -> Document:
        self.calls.append(f"slice {ratio}")
        write_model(output, f"{content_of(emulator, 'model.safetensors')} {ratio}")
        return Document(output=str(output))

    def refine_emulator(self, emulator: Path, *, model: Path, output: Path, **settings: Any) -> Document:
        self.calls.append(f"refine {settings['steps']}")
        self.arguments["refine"] = settings
        write_model(output, f"{content_of(emulator, 'model.safetensors')} refined {settings['steps']}")
        return Document(report=REPORT)

    def train_lora(self, emulator: Path, data: Any, output: Path, **settings: Any) -> Document:
        first: Any = data[0] if isinstance(data, list) else data
        file = Path(getattr(first, "path", first))
        self.calls.append(f"train {file.stem}" + (" direct" if Path(emulator).name == "model" else ""))
        self.data[self.calls[-1]] = data
        self.arguments[self.calls[-1]] = settings
        if error := self.fail.get(self.calls[-1].removeprefix("train ")):
            raise error
        base = content_of(Path(emulator), "model.safetensors")
        write_adapter(
            output, f"{base} {file.read_text()} {settings['lora_rank']} {settings['args'].get('learning_rate')}"
        )
        return Document(peak_device_bytes=9)

    def reference_scores(self, model: Path, data: str, output: Path, **settings: Any) -> Document:
        self.calls.append("reference")
        self.arguments["reference"] = {"data": data, **settings}
        output.mkdir()
        (output / "reference.json").write_text(f"{content_of(model, 'model.safetensors')} {Path(data).read_text()}")
        return Document(report=REPORT)

    def correct_adapter(self, adapter: Path, *, output: Path, limit: float | None, **settings: Any) -> Document:
        self.calls.append("correct")
        write_adapter(output, f"{content_of(adapter, 'adapter_model.safetensors')} corrected {limit}")
        return Document(report=REPORT)

    def polish_adapter(self, adapter: Path, *, data: str, output: Path, **settings: Any) -> Document:
        self.calls.append(f"polish {Path(data).stem}")
        self.arguments[self.calls[-1]] = settings
        write_adapter(output, f"{content_of(adapter, 'adapter_model.safetensors')} polished {settings['steps']}")
        return Document(report=REPORT)

    def merge_adapter(self, adapter: Path, *, model: Path, output: Path) -> Document:
        self.calls.append("merge")
        write_model(output, content_of(adapter, "adapter_model.safetensors"))
        return Document(report=REPORT)

    def evaluate_model(self, model: Path, data: str, *, adapters: Sequence[Path], **settings: Any) -> Document:
        self.calls.append(f"evaluate {len(adapters)}")
        scores = {"loss": 1.0, "perplexity": 2.7, "token_accuracy": 0.5, "tokens": 10}
        return Document(results=[{"adapter": a and str(a), **scores} for a in (None, *adapters)], report=REPORT)


def write_project(folder: Path) -> Path:
    """Write a manifest and the files it names; return its path."""
    write_model(folder / "model", "the original")
    for name in ("mix", "sql", "support", "test"):
        (folder / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n{{"text": "second line"}}\n')
    (folder / "m.yaml").write_text(MANIFEST)
    return folder / "m.yaml"


class Project:
    """A manifest in a folder, its store, and the stand-ins."""

    def __init__(self, folder: Path, fakes: FakeSteps) -> None:
        self.folder = folder
        self.fakes = fakes
        self.path = write_project(folder)
        self.store = ArtifactStore(folder / "home")

    def edit(self, old: str, new: str) -> None:
        text = self.path.read_text()
        assert old in text
        self.path.write_text(text.replace(old, new))

    def append(self, name: str) -> None:
        with open(self.folder / name, "a") as file:
            file.write('{"text": "one more"}\n')

    @property
    def manifest(self) -> Manifest:
        return load_manifest(self.path)

    def run(self, tasks: list[str] | None = None) -> list[str]:
        """Run, check that the plan foresaw it, and say which step functions were called."""
        foreseen = {step.name: step.state for step in plan(self.manifest, self.store, tasks).steps}
        assert not self.fakes.calls
        result = run(self.manifest, self.store, tasks)
        assert not result.failed
        for step in result.steps:
            # A step after one that must run is planned as "to run"; it may turn out to be cached (early cut-off).
            assert step.state == "cached" or foreseen[step.name] == "to run"
        return self.fakes.taken()

    def reasons(self) -> dict[str, str]:
        return {step.name: f"{step.state}: {step.reason}" for step in plan(self.manifest, self.store).steps}
