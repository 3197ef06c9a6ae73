"""The safetensors writer: safetensors reads its files back bit for bit, and a broken write leaves nothing."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.safetensors_format import TORCH_NAMES, read_header
from onelayer.compiler.storage.safetensors_writer import Entry, copy_entry, tensor_entry, write_index, write_safetensors

DTYPES = [getattr(torch, name) for name in TORCH_NAMES]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """List every bit pattern of the dtype, including NaNs with payload (a bool has only 0 and 1)."""
    generator = torch.Generator().manual_seed(7)
    count = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_returns_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = random_bits((3, 5), dtype)
    path = tmp_path / "one.safetensors"
    write_safetensors(path, [tensor_entry("t", tensor)], {"who": "onelayer"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "who": "onelayer"}
        if dtype is not torch.float8_e8m0fnu:  # safetensors' own torch reader does not know this one
            back = file.get_tensor("t")
            assert back.dtype is dtype
            assert back.shape == tensor.shape
            assert raw_bytes(back) == raw_bytes(tensor)
    table, _ = read_header(path)
    copy = tmp_path / "two.safetensors"
    write_safetensors(copy, [copy_entry("t", table["t"])], {"who": "onelayer"})
    assert copy.read_bytes() == path.read_bytes()


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(max_examples=40)
@given(parts=st.lists(st.tuples(shapes, st.sampled_from(DTYPES[:-2])), max_size=6))
def test_any_mixture_is_aligned_and_readable(
    parts: list[tuple[tuple[int, ...], torch.dtype]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("mixture") / "mixture.safetensors"
    tensors = {f"t{i}/é\n": random_bits(shape, dtype) for i, (shape, dtype) in enumerate(parts)}
    write_safetensors(path, [tensor_entry(name, tensor) for name, tensor in tensors.items()])
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(tensors)
    table, _ = read_header(path)
    for name, tensor in tensors.items():
        assert table[name].start % tensor.dtype.itemsize == 0
        assert path.read_bytes()[table[name].start : table[name].end] == raw_bytes(tensor)


def test_views_are_written_as_they_read(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    path = tmp_path / "views.safetensors"
    parts = {"t": base.t(), "row": base[1], "one": base[0, 0]}
    write_safetensors(path, [tensor_entry(name, tensor) for name, tensor in parts.items()])
    back = load_file(path)
    assert torch.equal(back["t"], base.t())
    assert torch.equal(back["row"], base[1])
    assert torch.equal(back["one"], base[0, 0])


def test_a_copy_goes_through_a_small_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onelayer.compiler.storage.safetensors_writer.BUFFER_BYTES", 64)
    tensor = torch.arange(100.0)
    write_safetensors(tmp_path / "a.safetensors", [tensor_entry("t", tensor)])
    info = read_header(tmp_path / "a.safetensors")[0]["t"]
    sizes = [len(chunk) for chunk in copy_entry("t", info).chunks()]
    assert sizes == [64] * 6 + [16]


def test_a_tensor_must_deliver_exactly_its_bytes(tmp_path: Path) -> None:
    def nine() -> Iterator[bytes]:
        yield b"\0" * 9

    def seven() -> Iterator[bytes]:
        yield b"\0" * 7

    for wrong in (nine, seven):
        with pytest.raises(RuntimeError, match=r"short delivered \d bytes of 8"):
            write_safetensors(tmp_path / "x.safetensors", [Entry("short", "F32", (2,), wrong)])
    assert not list(tmp_path.iterdir())


def test_a_disk_error_leaves_nothing_and_an_older_file_alone(tmp_path: Path) -> None:
    def full_disk() -> Iterator[bytes]:
        yield b"\0" * 4
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "x.safetensors"
    write_safetensors(path, [tensor_entry("t", torch.ones(2))])
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(path, [Entry("t", "F32", (2,), full_disk)])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_kill_in_the_middle_leaves_no_visible_file(tmp_path: Path) -> None:
    script = """
        import os, signal, sys
        from pathlib import Path
        from onelayer.compiler.storage.safetensors_writer import Entry, write_safetensors
        assert "torch" not in sys.modules
        def killed():
            yield b"0" * 4
            os.kill(os.getpid(), signal.SIGKILL)
        write_safetensors(Path(sys.argv[1]), [Entry("t", "F32", (2,), killed)])
    """
    path = tmp_path / "x.safetensors"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], env=environment, check=False)
    assert done.returncode == -9
    assert not path.exists()
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_dtype_that_the_format_lacks_is_named() -> None:
    with pytest.raises(InputError, match=r"weight: torch\.complex128"):
        tensor_entry("weight", torch.ones(2, dtype=torch.complex128))


def test_the_index_names_files_and_the_total(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    write_index(path, {"b": "two.safetensors", "a": "one.safetensors"}, 12, {"total_size": 99, "total_parameters": 3})
    assert json.loads(path.read_text()) == {
        "metadata": {"total_parameters": 3, "total_size": 12},
        "weight_map": {"a": "one.safetensors", "b": "two.safetensors"},
    }
    with pytest.raises(AssertionError):
        write_index(path, {"a": "../one.safetensors"}, 12)
