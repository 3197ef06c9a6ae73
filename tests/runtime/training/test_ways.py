"""Training an original: in memory or on disk, which is announced, with the same result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onelayer.compiler.errors import InputError
from onelayer.compiler.machine import devices
from onelayer.compiler.machine.distributed import Processes
from onelayer.runtime import TrainResult
from onelayer.runtime.streamed import ways
from onelayer.runtime.training import inputs
from onelayer.runtime.training.inputs import TrainData, longest_batch

Train = Callable[..., TrainResult]


def test_a_streamed_training_gives_the_resident_ones_adapter(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resident = train("resident", emulator="original", way="resident")
    assert "note: trained in memory" in capsys.readouterr().err
    streamed = train("streamed", emulator="original", way="streamed", micro_batch_size=1)
    assert "note: trained on disk" in capsys.readouterr().err
    assert resident.streamed is None
    report = streamed.streamed
    assert report is not None
    assert report.bytes_read > 0
    assert report.peak_device_bytes < report.largest_unit_bytes + report.workspace_bytes
    assert [loss for _, loss in streamed.losses] == pytest.approx([loss for _, loss in resident.losses], rel=1e-5)
    assert streamed.trainable_parameters == resident.trainable_parameters
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("streamed", "resident"))
    assert found.keys() == expected.keys()
    assert all((found[name] - expected[name]).abs().max() < 2e-6 for name in expected)


def test_auto_streams_what_does_not_fit(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ways, "free_bytes", lambda device: 1 << 10)
    result = train(emulator="original", cache_bytes=1 << 20, max_steps=1)
    assert result.streamed is not None
    assert "1.00 KiB are free; each batch reads 0 B" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("emulator", "settings", "message"),
    [
        ("half", {}, r"--way streamed: .*half is an emulator, which is made to fit; leave it out"),
        (
            "original",
            {"activations": "layer"},
            "--activations layer: .* inputs of layers exactly, on the host and in files; leave",
        ),
    ],
)
def test_what_does_not_go_with_streaming_is_refused(
    train: Train, tmp_path: Path, emulator: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(emulator=emulator, way="streamed", **settings)
    assert not (tmp_path / "adapter").exists()


def test_several_processes_are_refused(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "processes", lambda: Processes(0, 2))
    with pytest.raises(InputError, match=r"--way streamed: runs in one process; start it without torchrun"):
        train(emulator="original", way="streamed")
    assert not (tmp_path / "adapter").exists()


def test_the_largest_batch_is_counted() -> None:
    rows = TrainData([{"input_ids": [1] * length} for length in (3, 7)], "", 0, 0)
    arguments = {"per_device_train_batch_size": 4, "max_length": 16}
    assert longest_batch(rows, arguments) == 28
    assert longest_batch(rows, {**arguments, "packing": True}) == 64


def test_free_memory_is_that_of_the_device() -> None:
    assert devices.free_bytes(torch.device("cpu")) > 1 << 20
