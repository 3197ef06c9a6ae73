"""The processes of one run, as `torchrun` and `accelerate launch` start them, and what they agree on.

In: the environment that the launcher sets. Process 0 writes files and prints. What a process does next must not depend
on itself alone, so decisions are made together, over gloo. Torch-free until something is agreed on.
"""

import os
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# How long the others wait while one process works; a process that has gone is noticed at once.
_MOST_HOURS = 24

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How long a process waits for the launcher's store when it reports a failure.
_REPORT_SECONDS = 5
# What the processes count in the launcher's store: those that are here, and those that failed.
_HERE, _FAILURES = "onelayer/here", "onelayer/failures"
# How often a process looks whether all are here.
_LOOK_SECONDS = 0.02


# In what gloo raises when a process has gone; the error has no class of its own.
_GLOO_PLACE = "gloo/transport"


class ProcessEndedError(RuntimeError):
    """Another process has gone, so that nothing can be agreed on any more."""

    def __init__(self) -> None:
        super().__init__("another process of this run ended too early")


def named_failure(error: Exception) -> Exception:
    """Return an error that a library's own collective (DDP's) raised because a process has gone, by its name here."""
    if processes().is_alone or not isinstance(error, RuntimeError):
        return error
    from torch.distributed import DistError

    return ProcessEndedError() if isinstance(error, DistError) or _GLOO_PLACE in str(error) else error


@dataclass(frozen=True)
class Processes:
    """The number of this process and how many there are. Every method must be called by all of them."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there are no others."""
        return self.count == 1

    def by_first(self, work: Callable[[], T]) -> T:
        """Let process 0 do some work; return its result, or raise its error, in every process."""
        if self.is_alone:
            return work()
        outcome: tuple[Any, BaseException | None] = (None, None)
        if self.is_first:
            try:
                outcome = (work(), None)
            except Exception as error:
                self._broadcast((None, _portable(error)))
                raise
        value, failure = self._broadcast(outcome)
        if failure is not None:
            raise failure
        result: T = value
        return result

    def wait(self) -> None:
        """Wait until every process is here."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag if self.is_alone else any(self.gather(flag))

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their numbers."""
        if self.is_alone:
            return [value]
        found: list[Any] = [None] * self.count
        self._call("all_gather_object", found, value)
        return found

    def add_up(self, tensors: Sequence["torch.Tensor"]) -> None:
        """Replace each tensor by its sum over all processes, added in the order of their numbers."""
        if self.is_alone:
            return
        import torch

        for tensor in tensors:
            mine = tensor.detach().cpu().contiguous()
            parts = [torch.empty_like(mine) for _ in range(self.count)]
            self._call("all_gather", parts, mine)
            total = parts[0]
            for part in parts[1:]:
                total += part
            tensor.copy_(total)

    def add_up_in(self, owner: int, tensor: "torch.Tensor") -> None:
        """Replace a tensor in the process `owner` by its sum over all; the others' are of no use afterwards."""
        if not self.is_alone:
            self._call("reduce", tensor, dst=owner)

    def gather_in_first(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their numbers, in process 0; none in the others."""
        if self.is_alone:
            return [value]
        found: list[Any] | None = [None] * self.count if self.is_first else None
        self._call("gather_object", value, found, dst=0)
        return found or []

    def share(self, count: int) -> list[int]:
        """Return which of `count` pieces of work are this process's, all neighbors; the first is always process 0's."""
        return list(range(-(-self.rank * count // self.count), -(-(self.rank + 1) * count // self.count)))

    def share_of_both(self, first: int, others: int) -> tuple[list[int], int]:
        """Share `first` pieces of work and the `others` after them; return this process's, and how many are first."""
        mine = self.share(first)
        return [*mine, *(first + place for place in self.share(others))], len(mine)

    def _broadcast(self, outcome: Any) -> Any:
        boxed = [outcome]
        self._call("broadcast_object_list", boxed, src=0)
        return boxed[0]

    def _call(self, collective: str, *arguments: Any, **keywords: Any) -> None:
        """Call one of PyTorch's collectives. Raises `ProcessEndedError` if a process has gone."""
        import torch.distributed as distributed

        begin_processes()
        try:
            getattr(distributed, collective)(*arguments, **keywords)
        except RuntimeError as error:
            raise ProcessEndedError from error


def processes() -> Processes:
    """Return the processes of this run: one, unless a launcher says otherwise."""
    if not all(os.environ.get(name) for name in LAUNCHED):
        return Processes()
    return Processes(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def processes_here() -> int:
    """Return how many processes of this run share its machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if not processes().is_alone else 1


def begin_processes() -> None:
    """Begin the group of all processes, if there are several and it was not begun, when all of them are here.

    From then on each notices at once if another ends. Until then a signal or another's failure ends the wait: inside
    PyTorch's own it would not. Raises `ProcessEndedError` if another failed.
    """
    if processes().is_alone:
        return
    import torch
    import torch.distributed as distributed
    from torch.distributed.rendezvous import rendezvous

    if distributed.is_initialized():
        return
    most = timedelta(hours=_MOST_HOURS)
    store, rank, count = next(rendezvous("env://", timeout=most))
    store.add(_HERE, 1)
    while store.add(_HERE, 0) < count:
        if store.add(_FAILURES, 0):
            raise ProcessEndedError
        time.sleep(_LOOK_SECONDS)
    on_gpus = torch.cuda.is_available() and distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=most)


def reports_failure() -> bool:
    """Whether this process is the one that reports the run's failure: the first that fails, as others fail over it."""
    team = processes()
    if team.is_alone:
        return True
    from torch._C._distributed_c10d import TCPStore

    host, port, wait = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=_REPORT_SECONDS)
    try:
        return TCPStore(host, port, is_master=False, timeout=wait).add(_FAILURES, 1) == 1
    except Exception:  # the store goes with the process that holds it
        return team.is_first


def end_processes() -> None:
    """End the group of all processes, if one was begun, so that no process leaves before the others are done."""
    team = processes()
    if team.is_alone:
        return
    import torch.distributed as distributed

    if distributed.is_initialized():
        team.wait()
        distributed.destroy_process_group()


def _portable(error: Exception) -> Exception:
    """Return an error that other processes can raise."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
