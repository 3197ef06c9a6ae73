"""Shares the steps of an interrupted training among another number of processes than began it.

A step takes the rows of all processes together. Those that go on take the same rows in every step, in smaller or more
batches each, so that the steps and the losses stay those of the run that was begun. Torch-free.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.console import notice
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.storage.files import read_json, write_json

# In a training's work directory: the number of processes that began it.
PROCESSES_FILE = "processes.json"
# Arguments with which the order of the rows, or the steps of an epoch, depend on the batch of one process.
_HINDRANCES = ("accelerator_config", "auto_find_batch_size", "dataloader_drop_last")
_SAMPLING, _FREE_ORDERS = "train_sampling_strategy", (None, "random", "sequential")


def shared_steps(work: Path, arguments: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return a trainer's arguments with which these processes take the steps that the training in `work` began with.

    They are the given ones unless another number of processes began it. No batch gets larger. `kind` says what is
    trained: "sft", "dpo", "kto" or "denoiser". Raises `InputError` if the same steps cannot be taken.
    """
    team = processes()
    begun, is_whole = team.by_first(lambda: _begun(work))
    if begun == team.count:
        return dict(arguments)
    given = "per_device_train_batch_size", "gradient_accumulation_steps"
    batch_size, batches = (int(arguments[name]) for name in given)
    rows = begun * batch_size * batches
    said = f"{work}: the interrupted training was begun by {_counted(begun)}"
    if (hindrance := _hindrance(arguments, kind, is_whole=is_whole)) is not None:
        raise InputError(f"{said}, and {hindrance}; start {begun} again, or remove the directory")
    if rows % team.count:
        raise InputError(f"{said} with {rows} rows in a step, which {team.count} cannot share; start {begun} again")
    own = rows // team.count
    size = next(size for size in range(batch_size, 0, -1) if own % size == 0)
    notice(f"{said}; {_counted(team.count)} now take the same {rows} rows in each step, in batches of {size}")
    return {**arguments, **dict(zip(given, (size, own // size), strict=True))}


def _begun(work: Path) -> tuple[int, bool]:
    """Return how many processes began the training, and whether each checkpoint's optimizer is in one file."""
    file = work / PROCESSES_FILE
    if not file.is_file():
        write_json(file, {"processes": processes().count})
    return int(read_json(file)["processes"]), all((path / "optimizer.pt").is_file() for path in _checkpoints(work))


def _checkpoints(work: Path) -> list[Path]:
    return [path.parent for path in work.glob("checkpoint-*/complete")]


def _hindrance(arguments: Mapping[str, Any], kind: str, *, is_whole: bool) -> str | None:
    """Say why another number of processes cannot take the same steps; None if it can."""
    if kind == "kto":
        return "the loss of kto compares the rows of all processes"
    if kind == "denoiser":
        return "the noise of its pictures is drawn for that number"
    if not is_whole:
        return "its optimizer is spread over them"
    names = [name for name in _HINDRANCES if arguments.get(name)]
    names += [_SAMPLING] if arguments.get(_SAMPLING) not in _FREE_ORDERS else []
    return f"args.{names[0]} orders its rows for that number" if names else None


def _counted(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
