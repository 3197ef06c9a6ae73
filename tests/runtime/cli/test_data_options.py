"""The options that every command with data has, and figures that no JSON document may hold."""

from typing import Any

import pytest

import onelayer.compiler
from onelayer.runtime.cli.main import main


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_columns_and_split_apply_to_all_data(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setitem(onelayer.compiler.__dict__, "polish_adapter", lambda *_, **settings: given.update(settings))
    arguments = (
        "polish --model m --data a --data b --eval-data c --output o --columns text=body --split dev --config en"
    )
    call(*arguments.split())
    details = "split dev, config en, columns text=body"
    assert [str(source) for source in [*given["data"], *given["eval_data"]]] == [f"{n} ({details})" for n in "abc"]


def test_a_figure_that_is_no_number_is_never_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(onelayer.compiler.__dict__, "evaluate_model", lambda *_, **settings: {"loss": float("nan")})
    assert call("evaluate", "m", "--data", "d", "--json") == 1
    assert "not JSON compliant" in capsys.readouterr().err
