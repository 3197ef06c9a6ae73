"""Holds parked hidden states: in host memory up to a budget, above it in mapped files, with the same values.

A tensor moves when the same tensor object gets another storage. So every reference to it follows, including those in
the frames of the model's own code.
"""

import errno
import os
import tempfile
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as preserved_version
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from onelayer.compiler.machine.distributed import processes_here
from onelayer.compiler.machine.meter import return_free_memory
from onelayer.compiler.storage.files import onelayer_home

# Smaller tensors cost less to keep than to file.
SMALLEST_BYTES = 16 << 10
# Moving a tensor to a file leaves a hole in the heap that may never be reused, so without trimming, memory grows with
# the number of batches. Trimming after every tensor would take a quarter longer.
MOST_FREED_BYTES = 4 << 20
# The default budget of parked states of all processes on a machine, as a share of the memory that is free when the pass
# begins.
DEFAULT_SHARE = 0.5


class SpillPool:
    """Holds the tensors of parked batches within `budget_bytes` of host memory; the rest goes to mapped files."""

    def __init__(self, budget_bytes: int | None = None) -> None:
        available = psutil.virtual_memory().available
        share = DEFAULT_SHARE / processes_here()
        self.budget_bytes = int(available * share) if budget_bytes is None else budget_bytes
        self.spilled_bytes = 0
        self.held_bytes = 0  # host memory of the storages of all live tensors that it holds
        self._freed_bytes = 0  # by tensors that moved to files since free memory was last returned
        self._seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._users: Counter[int] = Counter()  # how many tensors share a storage, by its address

    def hold(self, arguments: Any) -> None:
        """Hold the tensors of one parked call; tensors that are held already are not counted again."""
        for tensor in tree_leaves(arguments):
            if type(tensor) is not torch.Tensor or tensor.device.type != "cpu" or tensor in self._seen:
                continue
            size_bytes = tensor.untyped_storage().nbytes()
            if size_bytes < SMALLEST_BYTES:
                continue
            self._seen[tensor] = True
            address = tensor.untyped_storage().data_ptr()
            known = self._users[address] > 0
            if not known and self.held_bytes + size_bytes > self.budget_bytes and tensor.is_contiguous():
                self._spill(tensor)
                continue
            self._users[address] += 1
            self.held_bytes += 0 if known else size_bytes
            weakref.finalize(tensor, self._release, address, size_bytes).atexit = False

    def _release(self, address: int, size_bytes: int) -> None:
        self._users[address] -= 1
        if not self._users[address]:
            del self._users[address]
            self.held_bytes -= size_bytes

    def _spill(self, tensor: torch.Tensor) -> None:
        directory = onelayer_home() / "spill"
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=directory)
        try:
            self._allocate(descriptor, tensor.nbytes, directory)
            mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.close(descriptor)
            Path(name).unlink()  # the mapping keeps the bytes exactly as long as the tensor lives
        # The values do not change, so autograd must not see a change.
        with torch.no_grad(), preserved_version(tensor):
            mapped.copy_(tensor.reshape(-1))
            tensor.set_(mapped.untyped_storage(), 0, tensor.shape, tensor.stride())
        self.spilled_bytes += tensor.nbytes
        self._freed_bytes += tensor.nbytes
        if self._freed_bytes >= MOST_FREED_BYTES:
            return_free_memory()
            self._freed_bytes = 0

    def _allocate(self, descriptor: int, size_bytes: int, directory: Path) -> None:
        """Reserve the blocks of a file now: on a full disk the kernel would kill who writes to a mapping without them.

        Raises `OSError` with the remedy if the disk is full.
        """
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size_bytes)
            else:
                os.truncate(descriptor, size_bytes)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                errno.ENOSPC,
                f"{directory}: the disk is full, {size_bytes} more bytes of waiting states do not fit next to the "
                f"{self.spilled_bytes} written so far; make room, or set ONELAYER_HOME to a folder on another disk",
            ) from error
