"""Where an output may appear: a place that cannot be published to is refused before any work."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from onelayer.compiler import (
    compile_emulator,
    correct_adapter,
    merge_adapter,
    polish_adapter,
    refine_emulator,
    slice_emulator,
)
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.files import check_output
from onelayer.compiler.storage.work_directory import WorkKind, work_directory
from onelayer.runtime import train_lora


@pytest.mark.parametrize("where", ["model", "model/out", "model/deep/er/out", "emulator/out", "link/out"])
def test_no_command_writes_into_what_it_reads(tmp_path: Path, where: str) -> None:
    for name in ("model", "emulator", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("model")
    model, emulator, adapter, output = (tmp_path / name for name in ("model", "emulator", "adapter", where))
    data = tmp_path / "rows.jsonl"
    takes_emulator: list[Callable[[], object]] = [
        lambda: slice_emulator(emulator, 0.3, output),
        lambda: train_lora(emulator, data, output),
    ]
    takes_model: list[Callable[[], object]] = [
        lambda: compile_emulator(model, data, output, ratio=0.5),
        lambda: merge_adapter(adapter, model=model, output=output),
        lambda: polish_adapter(adapter, model=model, data=data, output=output),
    ]
    takes_both: list[Callable[[], object]] = [
        lambda: refine_emulator(emulator, model=model, calibration=data, output=output),
        lambda: correct_adapter(adapter, emulator=emulator, model=model, output=output),
    ]
    source = "emulator" if where.startswith("emulator") else "model"
    for command in [*(takes_emulator if source == "emulator" else takes_model), *takes_both]:
        with pytest.raises(InputError, match=rf"lies in .*{source}, which is read; choose an --output outside"):
            command()


def test_the_working_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    for output in (Path(), tmp_path / "deep"):
        with pytest.raises(InputError, match="is the working directory"):
            check_output(output)
    with pytest.raises(InputError, match="does not name a directory"):
        check_output(Path("new/.."))
    check_output(Path("out"))


def test_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(InputError, match="is a mount point"):
        check_output(tmp_path / "out")


def test_permission_is_needed_where_the_output_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unwritable place is refused; root may write anywhere, so the system's answer is simulated."""
    (tmp_path / "shut/out").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "shut")
    for output in (tmp_path / "shut/out", tmp_path / "shut/new"):
        with pytest.raises(InputError, match=r"no permission in .*shut"):
            check_output(output)


def test_a_name_that_leaves_no_room_for_work_is_refused(tmp_path: Path) -> None:
    check_output(tmp_path / ("a" * 200))
    with pytest.raises(InputError, match="a name that is too long"):
        check_output(tmp_path / ("a" * 250))


def test_an_output_that_appears_while_the_lock_is_taken_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock

    acquire = FileLock.acquire

    def finished(self: FileLock, *arguments: object, **keywords: object) -> object:
        (tmp_path / "out").mkdir()  # by the process that just gave the lock back
        (tmp_path / "out/config.json").touch()
        return acquire(self, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(FileLock, "acquire", finished)
    with (
        pytest.raises(InputError, match="already holds files"),
        work_directory(tmp_path / "out", WorkKind("plain", finished="*"), {}),
    ):
        pytest.fail("the work was begun")
