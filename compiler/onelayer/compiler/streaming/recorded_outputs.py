"""Outputs from inside a unit that the model's caller asked for, such as the router logits of a mixture.

In transformers, hooks inside the layers add them to a collector of the running call. A stream runs units outside of
that call, so it gives them a collector of their own. Of transformers' semi-private surface this uses
`_active_collector`; `tests/runtime/streamed/test_trainers.py` shows that it broke.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.utils.output_capturing import _active_collector

Recorded = dict[str, list[Any]]
# Outputs of whole layers, which are recorded outside of the unit.
OF_LAYERS = "hidden_states"


def asked_outputs() -> Recorded | None:
    """Return the collector of the running call; None if nothing is asked for."""
    collector: Recorded | None = _active_collector.get()
    return collector or None


@contextmanager
def recording(asked: Mapping[str, Any] | None) -> Iterator[Recorded]:
    """Record inside `with` what `asked`, the collector of some call, asks for."""
    own: Recorded = {key: [] for key, found in (asked or {}).items() if isinstance(found, list) and key != OF_LAYERS}
    token = _active_collector.set(own or None)
    try:
        yield own
    finally:
        _active_collector.reset(token)


def hand_over(recorded: Recorded, asked: Recorded | None) -> None:
    """Add what a unit recorded to the collector of the call."""
    for key, found in recorded.items():
        assert asked is not None
        asked[key] += found
