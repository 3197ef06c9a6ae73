"""Headers and indexes from outside: valid ones are read, others are refused by name, and nothing crashes or hangs."""

import json
import os
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from helpers.tiny_models import save_tiny
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage import digests
from onelayer.compiler.storage.checkpoint import Checkpoint, model_digest, resolve_model
from onelayer.compiler.storage.digests import file_digest, sha256_file
from onelayer.compiler.storage.files import write_json
from onelayer.compiler.storage.safetensors_format import read_header
from onelayer.compiler.storage.stamps import stamp_of


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def row(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_HEADERS = {
    "offsets beyond the file": {"a": row(offsets=(0, 8)), "b": row(offsets=(8, 16))},
    "bytes do not fit the shape": {"a": row(shape=(3,))},
    "overlap": {"a": row(), "b": row(offsets=(4, 12))},
    "hole": {"a": row(offsets=(4, 12))},
    "trailing bytes": {"a": row(dtype="F16", shape=(2,), offsets=(0, 4))},
    "unknown dtype": {"a": row(dtype="F99")},
    "negative shape": {"a": row(shape=(-2,))},
    "shape of bool": {"a": row(shape=(True, 2))},
    "no offsets": {"a": {"dtype": "F32", "shape": [2]}},
    "row is no table": {"a": 3},
    "metadata of numbers": {"__metadata__": {"x": 1}, "a": row()},
    "list": [1, 2],
}


@pytest.mark.parametrize("fault", BAD_HEADERS)
def test_a_faulty_header_is_refused_with_the_name_of_the_file(fault: str, tmp_path: Path) -> None:
    file = write_raw(tmp_path / "model.safetensors", BAD_HEADERS[fault], bytes(8))
    with pytest.raises(InputError, match=r"model\.safetensors"):
        read_header(file)


@pytest.mark.parametrize("raw", [b"", b"\x01", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 9) + b"{}"])
def test_a_file_without_a_whole_header_is_refused(raw: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw)
    with pytest.raises(InputError, match="header size"):
        read_header(file)


@settings(max_examples=150)
@given(data=st.data())
def test_a_corrupted_file_is_read_right_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("x") / "model.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4)}, file)
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    file.write_bytes(raw)
    try:
        table, _ = read_header(file)
    except InputError:
        return
    assert all(0 <= info.start <= info.end <= len(raw) for info in table.values())


@settings(max_examples=60)
@given(
    name=st.one_of(
        st.text(max_size=12), st.sampled_from(["../x.safetensors", "/x.safetensors", "a/b.safetensors", "."])
    )
)
def test_an_index_cannot_lead_outside_its_directory(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("root")
    directory = root / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, root / "x.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError):
        Checkpoint.open(directory)


def test_tensors_rows_and_bytes_read(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path, dtype=torch.bfloat16, shards=4)
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint.files) > 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.bytes_read == sum(info.size_bytes for info in checkpoint.tensors.values())
    table = model.state_dict()["model.embed_tokens.weight"]
    rows = torch.tensor([5, 1, 7])
    assert torch.equal(checkpoint.gather_rows("model.embed_tokens.weight", rows.numpy()), table[rows])
    assert torch.equal(checkpoint.read_rows("model.embed_tokens.weight", 3, 9), table[3:9])


def test_missing_shard_missing_tensor_and_pickle_are_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, shards=3)
    index = tmp_path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    shard = next(iter(document["weight_map"].values()))
    (tmp_path / shard).rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="missing shard"):
        Checkpoint.open(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / shard)
    document["weight_map"]["not.there"] = shard
    index.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"'not\.there' is missing"):
        Checkpoint.open(tmp_path)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="a pickle can run code"):
        Checkpoint.open(tmp_path)


def test_the_digest_follows_content_and_not_time(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    before = model_digest(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.touch()
    assert model_digest(tmp_path) == before
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert model_digest(tmp_path) != before


def test_a_digest_is_remembered_for_the_same_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "big"
    file.write_bytes(bytes(2 << 20))
    first = file_digest(file)
    assert not digests._memo_path().exists(), "a file changed just now could change again within the same time stamp"
    monkeypatch.setattr(digests, "RACY_SECONDS", -1.0)
    assert file_digest(file) == first
    with monkeypatch.context() as patch:
        patch.setattr(digests, "sha256_file", lambda path: pytest.fail("hashed again"))
        assert file_digest(file) == first
    file.write_bytes(bytes(2 << 20) + b"x")
    assert file_digest(file) != first


def test_commands_that_run_together_keep_the_digests_of_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits between reading and writing what is remembered, so that without a lock all but one would be lost."""
    paths = [str(tmp_path / str(number)) for number in range(4)]
    entries = {path: {"stamp": [number], "sha256": str(number) * 64} for number, path in enumerate(paths)}

    def write_late(file: Path, memo: Any) -> None:
        time.sleep(0.02)
        write_json(file, memo)

    monkeypatch.setattr(digests, "write_json", write_late)
    for path in paths:
        Path(path).touch()
    with ThreadPoolExecutor() as pool:
        list(pool.map(digests._remember, paths, entries.values()))
    assert digests._read_memo() == entries


@pytest.mark.parametrize(
    "damage",
    [
        b"{",
        b"[" * 3000,
        b"[1]",
        b'{"PATH": 1}',
        b'{"PATH": {"stamp": STAMP}}',
        b'{"PATH": {"stamp": STAMP, "sha256": "ab"}}',
        b'{"PATH": {"stamp": [NaN], "sha256": "DIGEST"}}',
    ],
)
def test_a_damaged_memo_costs_a_hashing_and_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    monkeypatch.setattr(digests, "RACY_SECONDS", -1.0)
    file, memo = tmp_path / "big", digests._memo_path()
    file.write_bytes(bytes(2 << 20))
    stamp = json.dumps(list(stamp_of(file.stat()))).encode()
    memo.write_bytes(damage.replace(b"PATH", str(file).encode()).replace(b"STAMP", stamp).replace(b"DIGEST", b"0" * 64))
    assert file_digest(file) == sha256_file(file)
    assert [*digests._read_memo()] == [str(file)]


@pytest.mark.parametrize("how", ["in place", "by a rename"])
def test_a_file_replaced_with_size_and_time_kept_is_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(digests, "RACY_SECONDS", -1.0)
    file = tmp_path / "big"
    file.write_bytes(bytes(2 << 20))
    status = file.stat()
    first = file_digest(file)
    other = file if how == "in place" else tmp_path / "other"
    other.write_bytes(b"x" + bytes((2 << 20) - 1))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert file_digest(file) != first


def test_a_blob_of_the_hub_cache_is_not_believed_by_its_name(tmp_path: Path) -> None:
    name = "ab" * 32
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_bytes(b"damaged")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    assert file_digest(tmp_path / "model.safetensors") == sha256_file(tmp_path / "blobs" / name) != name


def test_a_model_that_is_nowhere_is_refused() -> None:
    with pytest.raises(InputError, match="no such directory"):
        resolve_model("/nowhere/at/all")
    with pytest.raises(InputError, match="not available from the Hub"):
        resolve_model("nobody/nothing")
