"""Two `onelayer run` of one manifest, in processes with homes of their own, on one directory of artifacts."""

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from helpers.fake_steps import write_project
from helpers.places import ROOT

TASKS = 8
STEP_SECONDS = 0.2
CODE = """
import sys, time; sys.path[:0] = {paths}
import pytest
from pathlib import Path
from helpers.fake_steps import FakeSteps
from onelayer.runtime.manifest.manifest import load_manifest
from onelayer.runtime.pipeline.run import run
from onelayer.runtime.store.store import ArtifactStore
fakes, home = FakeSteps(pytest.MonkeyPatch()), Path(sys.argv[1])
train = fakes.train_lora
def slow(*args, **fields):
    time.sleep({seconds})
    return train(*args, **fields)
import onelayer.runtime
onelayer.runtime.__dict__["train_lora"] = slow
manifest = load_manifest({manifest!r})
(home / "ready").touch()
while not (home.parent / "go").exists(): time.sleep(0.01)
result = run(manifest, ArtifactStore(home))
assert not result.failed, result.failed
print(*fakes.calls, sep="\\n")
"""


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A manifest of eight tasks, whose steps are stand-ins; training takes a while."""
    path = write_project(tmp_path)
    tasks = "".join(f"  task{number}: {{train: task{number}.jsonl}}\n" for number in range(TASKS))
    text = path.read_text()
    path.write_text(text[: text.index("tasks:")] + "tasks:\n" + tasks)
    for number in range(TASKS):
        (tmp_path / f"task{number}.jsonl").write_text(f'{{"text": "{number}"}}\n')
    return path


def test_two_runs_on_one_store_share_the_steps(tmp_path: Path, manifest: Path) -> None:
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    paths = [str(ROOT / part) for part in ("compiler", "runtime", "tests")]
    code = CODE.format(paths=paths, seconds=STEP_SECONDS, manifest=str(manifest))
    homes = [tmp_path / name for name in ("one", "two")]
    for home in homes:
        home.mkdir()
        (home / "artifacts").symlink_to(artifacts)
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(home)], stdout=subprocess.PIPE, text=True) for home in homes
    ]
    while not all((home / "ready").exists() for home in homes) and all(run.poll() is None for run in running):
        time.sleep(0.01)
    (tmp_path / "go").touch()
    calls = [run.communicate()[0].splitlines() for run in running]
    assert [run.returncode for run in running] == [0, 0]
    counts = Counter(call for mine in calls for call in mine)
    wanted = ["compile", *(f"train task{number}" for number in range(TASKS))]
    assert {call: counts[call] for call in wanted} == dict.fromkeys(wanted, 1), "each step once"
    trained = [sum(call.startswith("train") for call in mine) for mine in calls]
    assert min(trained) >= TASKS // 4, f"the runs do not share the work: {trained}"
