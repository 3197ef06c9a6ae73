"""Choosing a correction in few runs: what cannot win falls out early, and what is still the same runs once."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from helpers.corrections import TEXTS, Setting
from onelayer.compiler.correct import choose
from onelayer.compiler.correct.candidates import CANDIDATES, FINALISTS, first_rows, runs_per_row
from onelayer.compiler.correct.command import CorrectResult
from onelayer.compiler.models.units import Unit

ROWS, BATCH = 24, 3
LORA: dict[str, Any] = {"r": 3, "lora_alpha": 12, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    made = Setting(tmp_path_factory.mktemp("choose"), "llama", **LORA)
    rows = [{"text": f"{letter}{other} {other} {letter}"} for letter in "abcdef" for other in "wxyz"]
    made.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def counted(setting: Setting, name: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[CorrectResult, Any]:
    """Correct, and count how often rows run through each unit."""
    runs: Counter[str] = Counter()
    own = Unit.forward

    def forward(self: Unit, *args: Any, **kwargs: Any) -> Any:
        runs[self.name] += len((args or tuple(kwargs.values()))[0])
        return own(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Unit, "forward", forward)
        return setting.correct(name, data=setting.data, batch_size=BATCH, **changes), runs


def test_a_row_runs_a_third_as_often_and_the_choice_is_the_same(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ran 19 times, once unchanged and once for each of 18 corrections; equal ones share a run in addition."""
    monkeypatch.setattr(choose, "first_rows", lambda rows: rows)
    every, all_runs = counted(setting, "every", monkeypatch)
    assert "24 rows run 19 times each" in capsys.readouterr().err
    monkeypatch.setattr(choose, "first_rows", lambda rows: rows // 8)
    few, runs = counted(setting, "few", monkeypatch)
    notes = capsys.readouterr().err
    assert "18 corrections run over 3 rows, the best 4 over all 24: each row runs 6.8 times on average" in notes
    expected = ROWS * runs_per_row(ROWS, ROWS // 8)
    assert expected == ROWS * (1 + len(CANDIDATES) / 8 + FINALISTS * 7 / 8) < 0.36 * ROWS * (1 + len(CANDIDATES))
    assert runs["model.layers.1"] <= expected
    assert all_runs["model.layers.1"] <= ROWS * (1 + len(CANDIDATES))
    assert few.candidates is not None
    assert every.candidates is not None
    last = [item for item in few.candidates if item.rows == ROWS]
    assert len(last) == FINALISTS
    assert {item.rows for item in few.candidates} == {ROWS, ROWS // 8}
    same = {(item.solver, item.limit, item.scale): item.loss for item in every.candidates}
    for item in last:
        assert item.loss == pytest.approx(same[item.solver, item.limit, item.scale], rel=1e-6)
    assert (few.solver, few.limit, few.scale) == (every.solver, every.limit, every.scale)
    factors = 2 * every.report.bytes_read - few.report.bytes_read  # the emulator's are read once
    assert 0 < factors < every.report.bytes_read


def test_few_rows_are_not_divided_and_many_save_most() -> None:
    assert [first_rows(rows) for rows in (3, 63, 64, 100, 256, 800)] == [3, 63, 32, 32, 32, 100]
    assert runs_per_row(30, 30) == 1 + len(CANDIDATES)
    assert runs_per_row(800, 100) < 0.37 * (1 + len(CANDIDATES))


def test_units_before_the_first_adapted_one_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the unadapted original and all corrections share a run; losses stay those of separate runs."""
    setting = Setting(
        tmp_path, "llama", **{**LORA, "target_modules": ["layers.1.mlp.up_proj", "layers.1.self_attn.q_proj"]}
    )
    shared, runs = counted(setting, "shared", monkeypatch)
    assert runs["model.layers.0"] == len(TEXTS)
    assert runs["model.layers.1"] > 10 * len(TEXTS)
    monkeypatch.setattr("onelayer.compiler.correct.shared_runs.asked_outputs", lambda: {"everything": []})
    alone, runs = counted(setting, "alone", monkeypatch)
    assert runs["model.layers.0"] == len(TEXTS) * (1 + len(CANDIDATES))
    assert alone.candidates == shared.candidates


def test_corrections_that_no_limit_bounds_run_once(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """With limits that nothing reaches, they are the same correction in every unit."""
    trials = (("span", 1e6, 1.0), ("span", None, 1.0), ("span", 0.0, 1.0))
    monkeypatch.setattr(choose, "CANDIDATES", trials)
    result, runs = counted(setting, "unbounded", monkeypatch)
    assert runs["model.layers.1"] == runs["model.layers.0"] == ROWS * 3
    assert result.candidates is not None
    assert result.candidates[0].loss == result.candidates[1].loss != result.candidates[2].loss


def test_wrong_choices_do_not_run(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "one", "choices": [" two", " three", " four"], "answer": 1}] * 2
    data = setting.root / "choices.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = setting.data
    setting.data = data
    try:
        _, runs = counted(setting, "choices", monkeypatch)
    finally:
        setting.data = before
    assert runs["model.layers.1"] <= 2 * (1 + len(CANDIDATES))
