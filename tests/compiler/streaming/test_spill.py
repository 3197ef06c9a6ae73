"""Parked tensors in files: the same values, and a message in place of a dead process where the disk is full."""

import errno
import os
from typing import Any

import pytest
import torch

from onelayer.compiler.streaming.spill import SMALLEST_BYTES, SpillPool


def test_above_the_budget_tensors_move_to_files_and_keep_their_values() -> None:
    pool = SpillPool(SMALLEST_BYTES)
    kept, moved = (torch.arange(SMALLEST_BYTES // 4, dtype=torch.float32) for _ in range(2))
    alias = moved
    pool.hold([kept, moved])
    assert (pool.held_bytes, pool.spilled_bytes) == (SMALLEST_BYTES, SMALLEST_BYTES)
    assert alias.untyped_storage().is_shared()
    assert torch.equal(alias, kept)


def test_a_full_disk_is_said_before_anything_is_written_to_a_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write to a mapping that the disk has no block for would end the process without a word."""
    reserved: list[int] = []

    def full(descriptor: int, offset: int, size: int) -> None:
        reserved.append(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    tensor: Any = torch.ones(SMALLEST_BYTES)
    with pytest.raises(OSError, match=r"the disk is full, 65536 more bytes .* set ONELAYER_HOME"):
        SpillPool(0).hold([tensor])
    assert reserved == [tensor.nbytes]
    assert bool((tensor == 1).all())
