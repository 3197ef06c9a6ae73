"""A compile that is killed, interrupted or out of disk space resumes where it stopped and ends in the same bytes."""

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.children import fork_server
from helpers.hashes import hashes
from helpers.tiny_models import causal, tiny_tokenizer
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.errors import InputError

LAYERS = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    causal("Llama", num_hidden_layers=LAYERS).save_pretrained(root / "model", max_shard_size="40KB")
    tiny_tokenizer(root / "model")
    rows = [{"text": "the quick brown fox jumps over the lazy dog " * n} for n in (1, 2, 3)]
    (root / "mix.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    return root


def compile_to(source: Path, output: Path, **changes: Any) -> Any:
    return compile_emulator(
        source / "model", source / "mix.jsonl", output, **{"ratio": 0.5, "max_length": 32, **changes}
    )


def child(source: Path, output: Path, home: str) -> None:
    import torch

    os.environ["ONELAYER_HOME"] = home
    torch.set_num_threads(1)
    compile_to(source, output)


def test_twenty_kills_at_random_moments_end_in_the_same_bytes(source: Path, tmp_path: Path, own_store: Path) -> None:
    context = fork_server()

    def start(output: Path) -> Any:
        process = context.Process(target=child, args=(source, output, str(own_store)))
        process.start()
        return process

    start(tmp_path / "warm").join()
    begun = time.perf_counter()
    start(tmp_path / "calm").join()
    calm_seconds = time.perf_counter() - begun
    stormy, work = tmp_path / "stormy", tmp_path / ".stormy.compile"
    moments = random.Random(1)
    kills = finished = 0
    while kills < 20:
        process = start(stormy)
        time.sleep(moments.uniform(0.0, calm_seconds))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        before, finished = finished, len(list(work.glob("unit-*.json")))
        if stormy.exists():  # it was faster than the kill, or only its last breath was cut off
            assert hashes(stormy) == hashes(tmp_path / "calm")
            shutil.rmtree(stormy)
            finished = 0
        else:
            assert finished >= before, "a kill took finished units away"
    compile_to(source, stormy)
    assert hashes(stormy) == hashes(tmp_path / "calm")
    assert not work.exists()


@pytest.mark.parametrize("allocation", ["uniform", "spectrum"])
def test_finished_units_are_not_done_again(
    allocation: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onelayer.compiler.compile import job

    done: list[str] = []
    real = job.Compilation.compressed

    def counted(self: Any, linears: dict[str, Any], hooks: Any) -> Any:
        done.append(next(iter(linears)))
        if len(done) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, linears, hooks)

    monkeypatch.setattr(job.Compilation, "compressed", counted)
    with pytest.raises(OSError, match="No space left"):
        compile_to(source, tmp_path / "out", rank_allocation=allocation)
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / ".out.compile").glob("unit-*.json"))) == 3
    compile_to(source, tmp_path / "out", rank_allocation=allocation)
    assert len(done) == LAYERS + 1
    monkeypatch.undo()
    compile_to(source, tmp_path / "calm", rank_allocation=allocation)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "calm")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_the_next_boundary(
    number: signal.Signals, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onelayer.compiler.compile.writer import EmulatorWriter

    real = EmulatorWriter.write_unit
    before = signal.getsignal(number)

    def write_unit(self: Any, unit: Any, *compressed: Any) -> None:
        if unit.name == "model.layers.2":
            os.kill(os.getpid(), number)
        real(self, unit, *compressed)

    monkeypatch.setattr(EmulatorWriter, "write_unit", write_unit)
    with pytest.raises(KeyboardInterrupt):
        compile_to(source, tmp_path / "out")
    assert signal.getsignal(number) is before
    assert len(list((tmp_path / ".out.compile").glob("unit-*.json"))) == 3
    monkeypatch.undo()
    compile_to(source, tmp_path / "out")
    assert (tmp_path / "out" / "emulator.json").exists()


def interrupted(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stop a compile after three units."""
    from onelayer.compiler.compile import job

    count = 0
    real = job.Compilation.compressed

    def some(self: Any, linears: Any, hooks: Any) -> Any:
        nonlocal count
        count += 1
        if count > 3:
            raise KeyboardInterrupt
        return real(self, linears, hooks)

    with monkeypatch.context() as patch:
        patch.setattr(job.Compilation, "compressed", some)
        with pytest.raises(KeyboardInterrupt):
            compile_to(source, output)
    return output.with_name(f".{output.name}.compile")


def test_other_settings_are_refused_by_name_and_no_resume_starts_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = interrupted(source, tmp_path / "out", monkeypatch)
    with pytest.raises(InputError, match=r"settings was .*'ratio': 0\.5.* and is .*'ratio': 0\.4.*--no-resume"):
        compile_to(source, tmp_path / "out", ratio=0.4)
    assert len(list(work.glob("unit-*.json"))) == 3, "a refused run must not harm the work"
    result = compile_to(source, tmp_path / "out", ratio=0.4, resume=False)
    assert result.output == str(tmp_path / "out")
    assert not work.exists()


@pytest.mark.parametrize("damage", ["truncated", "a bit"])
def test_a_damaged_shard_is_done_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    work = interrupted(source, tmp_path / "out", monkeypatch)
    shard = sorted(work.glob("payload/*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-7] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    compile_to(source, tmp_path / "out")
    compile_to(source, tmp_path / "calm")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "calm")


def test_a_second_process_is_told_to_wait(source: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".out.compile.lock"), pytest.raises(InputError, match="another process is at work"):
        compile_to(source, tmp_path / "out")


def test_a_disk_without_room_is_refused_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 1000))
    with pytest.raises(InputError, match="GiB free"):
        compile_to(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_parked_states_may_lie_on_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onelayer.compiler.streaming import spill

    monkeypatch.setattr(spill, "SMALLEST_BYTES", 64)
    compile_to(source, tmp_path / "memory", host_memory_bytes=1 << 30)
    compile_to(source, tmp_path / "disk", host_memory_bytes=0)
    assert hashes(tmp_path / "memory") == hashes(tmp_path / "disk")
