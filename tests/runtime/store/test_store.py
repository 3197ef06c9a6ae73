"""The store: artifacts are complete or absent and made once, damage is named, and pruning spares what is in use."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.places import ROOT
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage import digests
from onelayer.runtime.reporting import summaries
from onelayer.runtime.store.prune import prune
from onelayer.runtime.store.record import StepSpec
from onelayer.runtime.store.store import ArtifactStore

PATHS = [str(ROOT / name) for name in ("compiler", "runtime")]


def spec(**fields: Any) -> StepSpec:
    return StepSpec(kind="train", step_version=1, fields=fields, inputs={"data": "d" * 64})


def fill(payload: Path) -> Mapping[str, Any]:
    (payload / "sub").mkdir(parents=True)
    (payload / "weights.bin").write_bytes(b"w" * 1000)
    (payload / "sub" / "notes.txt").write_text("n")
    return {"report": {"peak_device_bytes": 7, "peak_host_bytes": 8}}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def test_an_artifact_is_made_once_and_described(store: ArtifactStore) -> None:
    artifact, made = store.ensure(spec(r=8), fill)
    again, made_again = store.ensure(spec(r=8), fill)
    assert (made, made_again) == (True, False)
    assert artifact == again
    assert set(artifact.files) == {"weights.bin", "sub/notes.txt"}
    assert (artifact.total_bytes, artifact.peak_device_bytes, artifact.peak_host_bytes) == (1001, 7, 8)
    assert artifact.key == spec(r=8).key != spec(r=9).key
    assert "safetensors" in artifact.versions
    assert store.artifacts() == [artifact]


def test_everything_in_a_spec_reaches_the_key() -> None:
    base = StepSpec(kind="a", step_version=1, fields={"x": 1}, inputs={"i": "1"})
    others: list[dict[str, Any]] = [
        {"kind": "b"},
        {"step_version": 2},
        {"fields": {"x": 2}},
        {"inputs": {"i": "2"}},
        {"inputs": {"j": "1"}},
    ]
    assert len({base.key, *(base.model_copy(update=other).key for other in others)}) == 6


def test_the_digest_is_that_of_the_content_or_the_steps_own(store: ArtifactStore) -> None:
    first, _ = store.ensure(spec(r=1), fill)
    second, _ = store.ensure(spec(r=2), fill)
    named, _ = store.ensure(spec(r=3), fill, lambda payload: (payload / "sub" / "notes.txt").read_text())
    assert first.digest == second.digest
    assert named.digest == "n"


def test_a_failure_leaves_nothing(store: ArtifactStore) -> None:
    def half(payload: Path) -> Mapping[str, Any]:
        fill(payload)
        raise RuntimeError("full disk")

    with pytest.raises(RuntimeError, match="full disk"):
        store.ensure(spec(), half)
    assert store.artifacts() == []
    assert [path.name for path in store.root.iterdir()] == [".locks"]


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_kill_in_the_middle_leaves_nothing_visible(store: ArtifactStore) -> None:
    code = f"""
import sys, time; sys.path[:0] = {PATHS}
from pathlib import Path
from onelayer.runtime.store.record import StepSpec
from onelayer.runtime.store.store import ArtifactStore
def make(payload):
    payload.mkdir(); (payload / "weights.bin").write_bytes(b"half"); print("half", flush=True); time.sleep(60)
ArtifactStore({str(store.home)!r}).ensure(StepSpec.model_validate({spec().model_dump()!r}), make)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert store.artifacts() == []
    assert store.find(spec().key) is None
    artifact, made = store.ensure(spec(), fill)  # the dead process's lock does not block the next run
    assert made
    assert store.damage(artifact) is None
    assert not list(store.root.glob("*.partial"))


def test_two_threads_make_it_once(store: ArtifactStore) -> None:
    calls: list[float] = []
    messages: list[str] = []
    outcomes: list[bool] = []

    def slow(payload: Path) -> Mapping[str, Any]:
        calls.append(time.monotonic())
        time.sleep(0.3)
        return fill(payload)

    def work() -> None:
        outcomes.append(ArtifactStore(store.home).ensure(spec(), slow, notify=messages.append)[1])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert sorted(outcomes) == [False, False, True]
    assert len(messages) == 2
    assert "another run" in messages[0]


def test_two_processes_make_it_once(store: ArtifactStore, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"""
import sys, time; sys.path[:0] = {PATHS}
from onelayer.runtime.store.record import StepSpec
from onelayer.runtime.store.store import ArtifactStore
def make(payload):
    with open({str(log)!r}, "a") as file: file.write("made\\n")
    time.sleep(0.3); payload.mkdir(); (payload / "f").write_text("x"); return {{}}
ArtifactStore({str(store.home)!r}).ensure(StepSpec.model_validate({spec().model_dump()!r}), make)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert log.read_text() == "made\n"
    assert len(store.artifacts()) == 1


def flip_a_bit(file: Path) -> None:
    """Change the content but keep size and time stamp, as a bad disk does."""
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_verify_names_the_flipped_file(store: ArtifactStore) -> None:
    store.ensure(spec(r=1), fill)
    artifact, _ = store.ensure(spec(r=2), fill)
    assert store.verify() == []
    flip_a_bit(store.payload(artifact.key) / "weights.bin")
    (fault,) = store.verify()
    assert (fault.key, fault.file) == (artifact.key, "weights.bin")


def test_verify_reads_what_memory_believes(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "MEMO_FLOOR_BYTES", 0)
    monkeypatch.setattr(digests, "RACY_SECONDS", -1.0)
    monkeypatch.setattr(digests, "stamp_of", lambda status: (status.st_size,))  # a disk that damages without a trace
    artifact, _ = store.ensure(spec(), fill)
    assert store.damage(artifact) is None
    flip_a_bit(store.payload(artifact.key) / "weights.bin")
    assert store.damage(artifact) is None
    assert [fault.file for fault in store.verify()] == ["weights.bin"]


@pytest.mark.parametrize("damage", ["change", "remove", "add"])
def test_a_damaged_artifact_is_made_again(store: ArtifactStore, damage: str) -> None:
    artifact, _ = store.ensure(spec(), fill)
    payload = store.payload(artifact.key)
    if damage == "change":
        (payload / "weights.bin").write_bytes(b"x" * 1000)
    elif damage == "remove":
        (payload / "weights.bin").unlink()
    else:
        (payload / "extra").write_text("x")
    assert ("extra" if damage == "add" else "weights.bin") in str(store.damage(artifact))
    _, made = store.ensure(spec(), fill)
    assert made
    assert store.verify() == []


def test_unreadable_metadata_is_one_line_naming_the_file(store: ArtifactStore) -> None:
    artifact, _ = store.ensure(spec(), fill)
    file = store.root / artifact.key / "artifact.json"
    file.write_text(json.dumps({"key": 1}))
    with pytest.raises(InputError, match=r"artifact\.json"):
        store.artifacts()


def age(store: ArtifactStore, key: str, days: float) -> None:
    moment = time.time() - days * 86_400
    os.utime(store.root / key / "artifact.json", (moment, moment))


def test_prune_by_age_counts_from_the_last_use(store: ArtifactStore) -> None:
    old, used = (store.ensure(spec(r=r), fill)[0] for r in (1, 2))
    for artifact in (old, used):
        age(store, artifact.key, days=10)
    with store.use(used.key):
        pass
    assert prune(store, older_than_seconds=9 * 86_400, dry_run=True).removed == [old.key]
    pruned = prune(store, older_than_seconds=9 * 86_400)
    assert (pruned.removed, pruned.in_use) == ([old.key], [])
    assert pruned.freed_bytes > 1000
    assert [artifact.key for artifact in store.artifacts()] == [used.key]


def test_a_dry_run_lists_what_would_go(store: ArtifactStore) -> None:
    old = store.ensure(spec(r=1), fill)[0]
    age(store, old.key, days=10)
    partial = store.root / f".{spec(r=3).key}.partial"
    partial.mkdir()
    pruned = prune(store, keep=set(), dry_run=True)
    assert {(row.key, row.kind) for row in pruned.artifacts} == {(old.key, "train"), (spec(r=3).key, None)}
    text = summaries.pruned(pruned.model_dump(mode="json"))
    assert f"{old.key[:12]} train, " in text
    assert "last used 10 days ago" in text
    assert f"{spec(r=3).key[:12]} unfinished" in text
    assert store.find(old.key) is not None


def test_prune_by_size_takes_the_least_recently_used(store: ArtifactStore) -> None:
    keys = [store.ensure(spec(r=r), fill)[0].key for r in (1, 2, 3)]
    for days, key in zip((1, 3, 2), keys, strict=True):
        age(store, key, days)
    one_bytes = prune(store, keep={keys[0], keys[1]}, dry_run=True).freed_bytes
    assert prune(store, max_total_bytes=5 * one_bytes // 2).removed == [keys[1]]
    assert prune(store, max_total_bytes=10 * one_bytes).removed == []


def test_prune_keeps_what_is_reachable_and_clears_what_was_interrupted(store: ArtifactStore) -> None:
    keep, drop = (store.ensure(spec(r=r), fill)[0].key for r in (1, 2))
    partial = store.root / f".{spec(r=3).key}.partial"
    partial.mkdir()
    assert set(prune(store, keep={keep}).removed) == {drop, spec(r=3).key}
    assert store.find(keep) is not None
    assert store.find(drop) is None
    assert not partial.exists()


def test_prune_never_removes_what_is_in_use(store: ArtifactStore) -> None:
    artifact, _ = store.ensure(spec(), fill)
    other = ArtifactStore(store.home)
    with store.use(artifact.key), other.use(artifact.key):
        pass
    with store.use(artifact.key):
        assert prune(other, keep=set()).in_use == [artifact.key]
    assert prune(other, keep=set()).removed == [artifact.key]


def test_prune_never_removes_what_is_being_made(store: ArtifactStore) -> None:
    results = []

    def make(payload: Path) -> Mapping[str, Any]:
        worker = threading.Thread(target=lambda: results.append(prune(ArtifactStore(store.home), keep=set())))
        worker.start()
        worker.join()
        return fill(payload)

    artifact, _ = store.ensure(spec(), make)
    assert results[0].in_use == [artifact.key]
    assert store.damage(artifact) is None


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_dead_user_does_not_keep_an_artifact(store: ArtifactStore) -> None:
    artifact, _ = store.ensure(spec(), fill)
    code = f"""
import sys, time; sys.path[:0] = {PATHS}
from onelayer.runtime.store.store import ArtifactStore
with ArtifactStore({str(store.home)!r}).use({artifact.key!r}):
    print("using", flush=True); time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "using\n"
        assert prune(store, keep=set()).in_use == [artifact.key]
        process.send_signal(signal.SIGKILL)
    assert prune(store, keep=set()).removed == [artifact.key]
