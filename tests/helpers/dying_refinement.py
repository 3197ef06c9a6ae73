"""A refinement that dies once: at its second unit, as if it were killed."""

from typing import Any

import pytest

from onelayer.compiler.refine.reconstruction import refine_unit


def die_at_second_unit(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Raise `MemoryError` when the second unit is to be trained; return the list that names of units are added to."""
    trained: list[str] = []

    def dying(unit: Any, *rest: Any) -> Any:
        trained.append(unit.name)
        if len(trained) == 2:
            raise MemoryError("as if killed")
        return refine_unit(unit, *rest)

    monkeypatch.setattr("onelayer.compiler.refine.job.refine_unit", dying)
    return trained
