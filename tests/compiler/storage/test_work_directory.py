"""Interrupted work: resumed, refused or discarded, depending on its kind."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from onelayer.compiler.adapters.merge import MERGE_WORK
from onelayer.compiler.compile.resume import COMPILE_WORK
from onelayer.compiler.errors import InputError
from onelayer.compiler.polish.resume import POLISH_WORK
from onelayer.compiler.refine.resume import REFINE_WORK
from onelayer.compiler.storage.work_directory import WorkKind, publish_work, work_directory
from onelayer.runtime.store.store import ATTEMPT
from onelayer.runtime.training.checkpoints import TRAINING_WORK


def test_names_on_the_disk_stay_so_that_older_work_is_found(tmp_path: Path) -> None:
    kinds = (COMPILE_WORK, REFINE_WORK, POLISH_WORK, MERGE_WORK, TRAINING_WORK, ATTEMPT)
    assert [(kind.path(tmp_path / "v1.out").name, kind.record, kind.finished) for kind in kinds] == [
        (".v1.out.compile", "identity.json", "unit-*.json"),
        (".v1.out.refine", "identity.json", "unit-*.safetensors"),
        (".v1.out.polish", "identity.json", "state.safetensors"),
        (".v1.out.merge", ".merge.json", "[!.]*.safetensors"),
        (".v1.out.training", "settings.json", "checkpoint-*/complete"),
        (".v1.out.partial", "begun.json", "*"),
    ]


def leave(output: Path, kind: WorkKind, **identity: Any) -> None:
    """Leave work with one finished file."""
    with work_directory(output, kind, identity) as path:
        (path / "finished").touch()
        raise KeyboardInterrupt


def test_work_that_nobody_asked_to_resume(tmp_path: Path) -> None:
    output, plain = tmp_path / "out", WorkKind("plain", finished="finished")
    asks = WorkKind("asks", finished="finished", unasked="{path}: resume it")
    for kind in (plain, asks):
        with pytest.raises(KeyboardInterrupt):
            leave(output, kind, steps=(1, 2))
    with pytest.raises(InputError, match=r"\.out\.asks: resume it"), work_directory(output, asks, {}, resume=False):
        pass
    assert (tmp_path / ".out.asks/finished").exists()
    with work_directory(output, asks, {"steps": (1, 2)}) as path:  # a tuple is a list in the record
        assert (path / "finished").exists()
    with work_directory(output, plain, {"steps": (1, 2)}, resume=False) as path:
        assert not (path / "finished").exists()


@pytest.mark.parametrize("kind", [COMPILE_WORK, MERGE_WORK, TRAINING_WORK])
def test_one_process_at_a_time(tmp_path: Path, kind: WorkKind) -> None:
    path = kind.path(tmp_path / "v1.out")
    with (
        FileLock(path.with_name(f"{path.name}.lock")),
        pytest.raises(InputError, match="another process is"),
        work_directory(tmp_path / "v1.out", kind, {}),
    ):
        pass


def test_of_many_that_begin_at_once_each_has_the_directory_alone(tmp_path: Path) -> None:
    """The work of each is stopped, so that the lock's file comes and goes while others ask for it."""
    output, kind, entered = tmp_path / "out", WorkKind("plain", finished="finished"), list[int]()

    def work(number: int) -> None:
        for _ in range(25):
            with suppress(KeyboardInterrupt, InputError), work_directory(output, kind, {}) as path:
                (path / "mine").touch(exist_ok=False)
                entered.append(number)
                raise KeyboardInterrupt

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(set(entered)) > 1
    assert [*tmp_path.iterdir()] == []


def test_work_with_nothing_finished_is_in_nobodys_way(tmp_path: Path) -> None:
    output = tmp_path / "out"
    work = tmp_path / ".out.polish"
    polish = WorkKind("polish", finished="state")

    def stopped_with(file: str, steps: int) -> None:
        with work_directory(output, polish, {"steps": steps}) as path:
            (path / file).touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_with("start", 1)
    assert not work.exists()
    work.mkdir()  # a kill leaves it
    (work / "identity.json").write_text('{"steps": 1}')
    with pytest.raises(KeyboardInterrupt):
        stopped_with("state", 2)
    with (
        pytest.raises(InputError, match=r"steps was 2 and is 3.*--no-resume"),
        work_directory(output, polish, {"steps": 3}),
    ):
        pass
    assert (work / "state").exists()
    with work_directory(output, polish, {"steps": 2}) as path:
        assert (path / "state").exists()
    assert not list(tmp_path.iterdir()), "what is done leaves nothing"


@pytest.mark.parametrize("record", ["{", "[]", '{"steps": 3}'])
def test_a_kind_that_refuses_nothing_discards_what_it_cannot_take_up(tmp_path: Path, record: str) -> None:
    merge = WorkKind("merge", finished="[!.]*.bin", record=".merge.json", refused=None)
    work = merge.path(tmp_path / "out")
    work.mkdir()
    (work / "shard.bin").touch()
    (work / ".merge.json").write_text(record)
    with work_directory(tmp_path / "out", merge, {"steps": 2}) as path:
        assert [file.name for file in path.iterdir()] == [".merge.json"]
        (path / "shard.bin").touch()
        publish_work(path, merge, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["shard.bin"]
