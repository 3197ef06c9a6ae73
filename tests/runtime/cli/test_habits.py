"""What every command line has: signals that say how to continue, a short help, a version, completion."""

import signal

import pytest

import onelayer.compiler
import onelayer.runtime
from onelayer.runtime.cli.main import main


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_sigterm_says_how_to_continue(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(
        onelayer.compiler.__dict__, "merge_adapter", lambda *_, **settings: signal.raise_signal(signal.SIGTERM)
    )
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        assert call("merge", "adapter", "--model", "m", "--output", "o") == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "run the same command again" in capsys.readouterr().err


def test_short_help_version_and_completion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("-h") == call("artifacts", "prune", "-h") == 0
    assert capsys.readouterr().out.count("Usage: onelayer") == 2
    assert call("--version") == 0
    assert capsys.readouterr().out == f"onelayer {onelayer.runtime.__version__}\n"
    monkeypatch.setenv("_ONELAYER_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "onelayer eva")
    monkeypatch.setenv("COMP_CWORD", "1")
    call()
    assert "evaluate" in capsys.readouterr().out
