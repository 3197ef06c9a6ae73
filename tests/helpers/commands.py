"""Commands as a program calls them, and the way of a folder of files through all of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from onelayer.runtime.cli.main import main


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    """Run a command that must succeed; return what it prints with `--json`."""
    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments), "--json"])
    shown = capsys.readouterr()
    assert caught.value.code == 0, shown.err
    return json.loads(shown.out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Run a command that must be refused; return what it says."""
    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments)])
    assert caught.value.code == 2
    return capsys.readouterr().err


def through_every_command(capsys: pytest.CaptureFixture[str], folder: Path, *training: Any) -> tuple[Any, Any, Any]:
    """Take `folder/data` and `folder/model` from compile to a merged model in `folder/made`.

    Returns what compile, polish and the evaluation of the polished adapter print.
    """
    model, data, made = folder / "model", folder / "data", folder / "made"
    emulator = run(capsys, "compile", model, "--calibration", data, "--output", made / "emulator", "--ratio", "0.5")
    trained = ("--max-steps", "3", "--batch-size", "4", "--learning-rate", "0.02", *training)
    run(capsys, "train", made / "emulator", "--data", data, "--output", made / "adapter", *trained)
    fits = ("--emulator", made / "emulator", "--model", model)
    run(capsys, "correct", made / "adapter", *fits, "--output", made / "corrected")
    steps = ("--steps", "2", "--batch-size", "6", "--micro-batch-size", "3", "--learning-rate", "0.01")
    read = ("--model", model, "--data", data)
    polished = run(capsys, "polish", made / "corrected", *read, "--output", made / "polished", *steps)
    run(capsys, "merge", made / "polished", "--model", model, "--output", made / "merged")
    adapter = ("--adapter", made / "polished", "--batch-size", "5")
    return emulator, polished, run(capsys, "evaluate", model, "--data", data, *adapter)
