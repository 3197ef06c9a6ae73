"""Inputs that change while a command works: nothing made from them is published, even if they are restored."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers.hashes import hashes, tree_hashes
from helpers.peft_adapters import load_original, random_adapter
from helpers.tiny_models import causal, tiny_tokenizer
from onelayer.compiler import (
    compile_emulator,
    correct_adapter,
    evaluate_model,
    merge_adapter,
    polish_adapter,
    refine_emulator,
    slice_emulator,
)
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.runtime import train_lora

CHANGED = "changed while it was read; leave it alone and run the same command again"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("place")
    causal("Llama", num_hidden_layers=3).save_pretrained(root / "model", max_shard_size="60KB")
    tiny_tokenizer(root / "model")
    row = {"text": "the quick brown fox jumps over the lazy dog"}
    (root / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    compile_emulator(root / "model", root / "rows.jsonl", root / "emulator", ratio=0.5, max_length=32)
    random_adapter(load_original(root / "model"), root / "adapter", r=2, target_modules=["q_proj"])
    return root


def swap(file: Path, work: Callable[[], None]) -> None:
    """Put other bytes in place of a file while `work` is done, then the file itself, with its own time."""
    aside = file.with_name("aside")
    file.rename(aside)
    content = bytearray(aside.read_bytes())
    content[-400:] = bytes(400)
    file.write_bytes(content)
    work()
    aside.replace(file)


def run(name: str, at: Path, output: Path) -> Any:
    data: dict[str, Any] = {"max_length": 32, "batch_size": 2}
    commands: dict[str, Callable[[], Any]] = {
        "compile": lambda: compile_emulator(at / "model", at / "rows.jsonl", output, ratio=0.5, **data),
        "refine": lambda: refine_emulator(
            at / "emulator", model=at / "model", calibration=at / "rows.jsonl", output=output, steps=1, **data
        ),
        "slice": lambda: slice_emulator(at / "emulator", 0.3, output),
        "train": lambda: train_lora(at / "emulator", at / "rows.jsonl", output, max_steps=1, **data),
        "correct": lambda: correct_adapter(at / "adapter", emulator=at / "emulator", model=at / "model", output=output),
        "polish": lambda: polish_adapter(
            at / "adapter", model=at / "model", data=at / "rows.jsonl", output=output, steps=1, **data
        ),
        "merge": lambda: merge_adapter(at / "adapter", model=at / "model", output=output),
        "evaluate": lambda: evaluate_model(at / "model", at / "rows.jsonl", **data),
    }
    return commands[name]()


READ = [
    ("compile", "model"),
    ("refine", "model"),
    ("refine", "emulator"),
    ("slice", "emulator"),
    ("train", "emulator"),
    ("correct", "model"),
    ("correct", "emulator"),
    ("correct", "adapter"),
    ("polish", "model"),
    ("polish", "adapter"),
    ("merge", "model"),
    ("merge", "adapter"),
    ("evaluate", "model"),
]


@pytest.mark.parametrize(("command", "changed"), READ)
def test_nothing_is_made_of_an_input_that_changed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, changed: str
) -> None:
    at = shutil.copytree(place, tmp_path / "at")
    file = max((at / changed).glob("*.safetensors"))
    enter = Meter.__enter__  # of every command, when its inputs are digested and before they are read

    def swapped(self: Meter) -> Meter:
        swap(file, lambda: None)
        return enter(self)

    monkeypatch.setattr(Meter, "__enter__", swapped)
    with pytest.raises(InputError, match=rf"{file.name}: {CHANGED}"):
        run(command, at, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    run(command, at, tmp_path / "out")


def test_a_shard_replaced_in_a_compile_and_restored_leaves_no_trace(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = shutil.copytree(place, tmp_path / "at")
    read = Checkpoint.read
    seen: list[str] = []

    def swapping(self: Checkpoint, name: str) -> Any:
        if "layers.1." not in name or "down_proj" not in name or seen:
            return read(self, name)
        found: list[Any] = []
        swap(self.tensors[name].file, lambda: found.append(load_file(self.tensors[name].file)[name]))
        seen.append(name)
        return found[0]

    monkeypatch.setattr(Checkpoint, "read", swapping)
    with pytest.raises(InputError, match=CHANGED):
        run("compile", at, tmp_path / "out")
    assert seen
    monkeypatch.undo()
    run("compile", at, tmp_path / "out")
    run("compile", at, tmp_path / "calm")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "calm")


def test_a_hard_link_and_a_touch_of_nothing_read_change_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = shutil.copytree(place, tmp_path / "at")
    enter = Meter.__enter__

    def linked(self: Meter) -> Meter:
        os.link(at / "adapter/adapter_model.safetensors", tmp_path / "linked")
        (at / "model/notes.txt").write_text("nothing that is read")
        return enter(self)

    monkeypatch.setattr(Meter, "__enter__", linked)
    run("merge", at, tmp_path / "out")
    assert (tmp_path / "linked").exists()
    monkeypatch.undo()
    run("merge", at, tmp_path / "calm")
    assert tree_hashes(tmp_path / "out") == tree_hashes(tmp_path / "calm")
