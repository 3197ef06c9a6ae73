"""Giving memory back between units: only where the process has grown, not counting what batches keep."""

import pytest

from onelayer.compiler.machine import meter

MIB = 1 << 20


@pytest.mark.parametrize(
    ("readings", "kept", "returned"),
    [
        ([100, 120, 100, 131], [0, 0, 0, 0], 0),  # what one unit leaves serves the next
        ([100, 133, 110, 140], [0, 0, 0, 0], 2),
        ([100, 150, 200, 250], [0, 50, 100, 150], 0),  # batches keep more with every unit on the way forward
        ([250, 250, 250], [150, 130, 110], 1),  # and free it on the way back
    ],
)
def test_memory_is_returned_where_the_process_grew(
    monkeypatch: pytest.MonkeyPatch, readings: list[int], kept: list[int], returned: int
) -> None:
    values, calls = iter(readings), list[int]()
    monkeypatch.setattr(meter, "anonymous_bytes", lambda: next(values) * MIB)
    monkeypatch.setattr(meter, "return_free_memory", lambda: calls.append(1))
    freed = meter.FreedMemory()
    for kept_bytes in kept:
        freed.after_unit(kept_bytes * MIB)
    assert len(calls) == returned
