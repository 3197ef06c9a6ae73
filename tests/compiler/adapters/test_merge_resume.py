"""A merge that is stopped, killed, disturbed by another or broken by the disk: what remains, and how it resumes."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from helpers.peft_adapters import load_original, random_adapter
from helpers.tiny_models import save_tiny
from onelayer.compiler.adapters.merge import MERGE_WORK, merge_adapter
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.compiler.storage.safetensors_writer import write_safetensors


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class StoppedError(Exception):
    pass


def stop_after(shards: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make later merges stop once that many shards are begun; return a list that collects finished ones' names."""
    written: list[str] = []
    begun = itertools.count()

    def counting(path: Path, *arguments: Any) -> str:
        if next(begun) >= shards:
            raise StoppedError
        digest = write_safetensors(path, *arguments)
        written.append(path.name)
        return digest

    monkeypatch.setattr("onelayer.compiler.adapters.merge_shards.write_safetensors", counting)
    return written


def test_a_stopped_merge_goes_on_where_it_was_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path / "original", torch.bfloat16, shards=4)
    (tmp_path / "original/additional_chat_templates").mkdir()
    (tmp_path / "original/additional_chat_templates/tools.jinja").write_text("kept")
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", r=4, target_modules="all-linear")
    merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "wanted")
    with monkeypatch.context() as patched:
        first = stop_after(2, patched)
        with pytest.raises(StoppedError):
            merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert (tmp_path / ".out.merge").is_dir()
    with monkeypatch.context() as patched:
        second = stop_after(99, patched)
        result = merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "out")
    assert len(first) == 2
    assert not set(first) & set(second)
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")
    assert result.report.bytes_read > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "original", "out", "wanted"]


@pytest.mark.parametrize("damage", ["a bit", "the record"])
def test_a_finished_shard_that_was_damaged_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    save_tiny("llama", tmp_path / "original", torch.bfloat16, shards=4)
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", r=4, target_modules="all-linear")
    merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "wanted")
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(StoppedError):
            merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "out")
    shard = min((tmp_path / ".out.merge").glob("*.safetensors"))
    if damage == "a bit":
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    else:
        (shard.parent / f".{shard.name}.json").write_text("{")
    merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")


def test_work_on_something_else_is_never_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "original", shards=4)
    for name in ("one", "two"):
        seed = len(name) + ord(name[0])
        random_adapter(
            load_original(tmp_path / "original"), tmp_path / name, r=2, target_modules="all-linear", seed=seed
        )
    merge_adapter(tmp_path / "two", model=tmp_path / "original", output=tmp_path / "wanted")
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(StoppedError):
            merge_adapter(tmp_path / "one", model=tmp_path / "original", output=tmp_path / "out")
    merge_adapter(tmp_path / "two", model=tmp_path / "original", output=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")


def test_a_merge_that_was_killed_goes_on(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "original", shards=5)
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", r=2, target_modules="all-linear")
    merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "wanted")
    program = (
        "import sys, time\nfrom onelayer.compiler.adapters import merge, merge_shards\n"
        "write = merge_shards.write_safetensors\n"
        "def slow(*arguments):\n    digest = write(*arguments)\n    time.sleep(60 if 'shard' in globals() else 0)\n"
        "    globals()['shard'] = 1\n    return digest\n"
        "merge_shards.write_safetensors = slow\nmerge.merge_adapter(sys.argv[1], model=sys.argv[2], output=sys.argv[3])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    arguments: list[Any] = [
        sys.executable,
        "-c",
        program,
        tmp_path / "adapter",
        tmp_path / "original",
        tmp_path / "out",
    ]
    with subprocess.Popen(arguments, env=environment) as process:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / ".out.merge").glob("*.safetensors"))) < 2 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "original")
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", r=2, target_modules=["q_proj"])
    with FileLock(tmp_path / ".out.merge.lock"), pytest.raises(InputError, match="another process is merging it"):
        merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "out")
    assert MERGE_WORK.record.startswith("."), "the record is not part of a model, even if it remains"
    merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "out")


def test_an_error_while_reading_ahead_is_raised_where_the_work_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path / "original", shards=3)
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", r=2, target_modules="all-linear")
    read_rows = Checkpoint.read_rows

    def failing(self: Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
        if "layers.0.mlp.up_proj" in name:
            raise OSError("disk error")
        return read_rows(self, name, start, stop)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "read_rows", failing)
        with pytest.raises(OSError, match="disk error"):
            merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / ".out.merge", ignore_errors=True)
