"""Ten user mistakes, through the real commands: one clear line, exit code 2, nothing half-written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.peft_adapters import random_adapter
from helpers.reference_emulators import write_emulator
from helpers.tiny_models import save_tiny
from onelayer.runtime.cli.main import main


class Project:
    """Make a tiny model, its emulator, an adapter and data, all valid."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = save_tiny("llama", root / "model", shards=3)
        (root / "data.jsonl").write_text('{"text": "the quick brown fox"}\n' * 3)
        write_emulator(self.model, root / "model", root / "emulator", ratio=0.5)
        random_adapter(self.model, root / "adapter", target_modules=["q_proj"])

    def edit_config(self, **changes: object) -> None:
        path = self.root / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def compile(self, *arguments: str) -> list[str]:
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        options = {"--calibration": str(self.root / "data.jsonl"), "--output": str(self.root / "out"), **given}
        return ["compile", str(self.root / "model"), *(part for pair in options.items() for part in pair)]

    def correct(self, adapter: str = "adapter", model: str = "model") -> list[str]:
        paths = {"--emulator": "emulator", "--model": model, "--output": "out"}
        options = [part for name, path in paths.items() for part in (name, str(self.root / path))]
        return ["correct", str(self.root / adapter), *options]


def missing_shard(project: Project) -> list[str]:
    next((project.root / "model").glob("*.safetensors")).unlink()
    return project.compile()


def truncated_shard(project: Project) -> list[str]:
    shard = next((project.root / "model").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    return project.compile()


def pickle_only(project: Project) -> list[str]:
    for file in (project.root / "model").glob("*.safetensors*"):
        file.unlink()
    (project.root / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return project.compile()


def unknown_architecture(project: Project) -> list[str]:
    project.edit_config(architectures=["MartianForCausalLM"], model_type="martian")
    return project.compile()


def empty_calibration(project: Project) -> list[str]:
    (project.root / "empty.jsonl").write_text("\n")
    return project.compile("--calibration", str(project.root / "empty.jsonl"))


def malformed_line(project: Project) -> list[str]:
    (project.root / "bad.jsonl").write_text('{"text": "fine"}\n{"text": "unfinished\n')
    return project.compile("--calibration", str(project.root / "bad.jsonl"))


def unknown_field(project: Project) -> list[str]:
    manifest = project.root / "manifest.yaml"
    manifest.write_text(
        "version: 1\nmodel: {path: model}\nemulator: {calibration: {data: data.jsonl}, ratoi: 0.3}\n"
        "tasks: {a: {train: data.jsonl, test: data.jsonl}}\n"
    )
    return ["run", str(manifest)]


def another_base(project: Project) -> list[str]:
    save_tiny("llama_tied", project.root / "other")
    return project.correct(model="other")


def dora_adapter(project: Project) -> list[str]:
    random_adapter(
        save_tiny("llama", project.root / "again"), project.root / "dora", target_modules=["q_proj"], use_dora=True
    )
    return project.correct(adapter="dora")


def unwritable_output(project: Project) -> list[str]:
    return project.compile("--output", "/proc/nobody/may/write/here")


FAULTS: dict[Callable[[Project], list[str]], tuple[str, ...]] = {
    missing_shard: ("missing shard", "model-0"),
    truncated_shard: ("truncated", "model-0"),
    pickle_only: ("pickle", "pytorch_model.bin", "safetensors"),
    unknown_architecture: ("martian", "config.json"),
    empty_calibration: ("empty.jsonl", "no examples"),
    malformed_line: ("bad.jsonl:2",),
    unknown_field: ("manifest.yaml", "ratoi", "ratio"),
    another_base: ("other", "emulator"),
    dora_adapter: ("adapter_config.json", "DoRA"),
    unwritable_output: ("/proc/nobody", "--output"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_one_line_and_exit_code_2(
    fault: Callable[[Project], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project(tmp_path)
    arguments = fault(project)
    before = sorted(path for path in tmp_path.rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("onelayer: error: ")
    assert "Traceback" not in captured.err
    for part in FAULTS[fault]:
        assert part in captured.err
    assert sorted(path for path in tmp_path.rglob("*")) == before, "something was left on the disk"
