"""Finds the checkpoint to resume an interrupted training from, among those that are complete.

The trainer writes checkpoints to `.NAME.training` next to the output. A step takes the rows of all processes together.
Where another number of processes goes on, they take the same rows in every step, in smaller or more batches each, so
that the steps and the losses stay those of the run that was begun. Torch-free.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveInt

from onelayer.compiler.documents import checked_document
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.console import notice
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.results import Result
from onelayer.compiler.storage.digests import sha256_file
from onelayer.compiler.storage.files import read_json, write_json
from onelayer.compiler.storage.work_directory import WorkKind
from onelayer.runtime.activations.report import ActivationReport

# Written last into a checkpoint, with the digest of every other file in it. Without it, a kill in the middle of saving,
# or of removing an old checkpoint, would leave one that looks complete.
COMPLETE_FILE = "complete"
COMPLETE_CHECKPOINTS = f"checkpoint-*/{COMPLETE_FILE}"
TRAINING_WORK = WorkKind(
    "training",
    finished=COMPLETE_CHECKPOINTS,
    record="settings.json",
    refused="{record}: the interrupted training was begun with other {fields}; give the same, or remove the directory",
    unasked="{path}: holds an interrupted training; continue it with --resume, or remove the directory",
)

# In a training's work directory: the number of processes that began it.
PROCESSES_FILE = "processes.json"
# Arguments with which the order of the rows, or the steps of an epoch, depend on the batch of one process.
_HINDRANCES = ("accelerator_config", "auto_find_batch_size", "dataloader_drop_last")
_SAMPLING, _FREE_ORDERS = "train_sampling_strategy", (None, "random", "sequential")


class _Begun(BaseModel):
    """The file `PROCESSES_FILE`."""

    processes: PositiveInt


class _Logged(BaseModel):
    step: PositiveInt
    loss: float | None = None


class _State(BaseModel):
    """The fields of a trainer's state that decide how a training continues."""

    global_step: int
    max_steps: int
    epoch: float | None = None
    log_history: list[_Logged]


def check_state(checkpoint: Path) -> None:
    """Raise `InputError` if the trainer's state in a checkpoint is damaged: the trainer would fail over it, or go on.

    A run without that checkpoint starts from the one before.
    """
    from transformers import TrainerState

    file, remedy = checkpoint / "trainer_state.json", f"remove {checkpoint.name} to continue from the one before it"
    state = checked_document(_State, read_json(file, finite=False), file, remedy)
    try:
        TrainerState.load_from_json(str(file))
    except Exception as error:  # it takes the fields as they come
        raise InputError(f"{file}: no state of a trainer ({error}); {remedy}") from None
    if state.global_step != checkpoint_step(checkpoint):
        raise InputError(f"{file}: field global_step: is {state.global_step}; {remedy}")


def checkpoint_step(checkpoint: Path) -> int:
    """Return the number of steps that were taken before a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


# What was measured on the first batch of all; a resumed run begins with another batch, which would measure otherwise.
FIRST_BATCH_FILE = "first_batch.json"


class FirstBatch(Result):
    """Figures of the first batch: bytes kept for its backward pass, and how activations were compressed if so."""

    saved_activation_bytes: int
    activations: ActivationReport | None = None


class HeldOutScore(Result):
    """The mean loss over held-out rows after a step, in nats per labeled token (of a classifier: per text).

    For preferences it is the method's loss. `preference_accuracy` is then the share of pairs whose chosen answer gained
    more log-likelihood over the reference than the rejected one.
    """

    step: int
    loss: float
    preference_accuracy: float | None = None


def read_first_batch(work: Path) -> FirstBatch | None:
    """Return what an interrupted run measured on its first batch, or None. Raises `InputError` if it is damaged."""
    file = work / FIRST_BATCH_FILE
    remedy = "remove the file to measure the next batch"
    return checked_document(FirstBatch, read_json(file), file, remedy) if file.is_file() else None


def mark_complete(checkpoint: Path) -> None:
    """Record that all files of a checkpoint are on the disk."""
    write_json(checkpoint / COMPLETE_FILE, {"files": _digests(checkpoint)})


def remove_older(work: Path, kept: int | None) -> None:
    """Remove all but the `kept` newest checkpoints; without a positive number remove none, as Trainer does."""
    oldest_first = sorted((path for path in work.glob("checkpoint-*") if path.is_dir()), key=checkpoint_step)
    for checkpoint in oldest_first[:-kept] if kept is not None and kept > 0 else []:
        shutil.rmtree(checkpoint)


def newest_checkpoint(work: Path) -> Path | None:
    """Return the checkpoint to continue from, or None; one that is damaged is passed over."""
    marked = [file.parent for file in work.glob(COMPLETE_CHECKPOINTS)]
    newest_first = sorted(marked, key=checkpoint_step, reverse=True)
    return next((path for path in newest_first if _is_whole(path)), None)


def checked_newest(work: Path) -> Path | None:
    """Return the checkpoint to continue from, or None. Raises `InputError` if its state is damaged."""
    checkpoint = newest_checkpoint(work)
    if checkpoint is not None:
        check_state(checkpoint)
    return checkpoint


def _is_whole(checkpoint: Path) -> bool:
    try:
        document = read_json(checkpoint / COMPLETE_FILE)
    except InputError:
        return False
    return isinstance(document, dict) and document.get("files") == _digests(checkpoint)


def _digests(checkpoint: Path) -> dict[str, str]:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE_FILE)
    return {path.relative_to(checkpoint).as_posix(): sha256_file(path) for path in files}


def shared_steps(work: Path, arguments: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Return a trainer's arguments with which these processes take the steps that the training in `work` began with.

    They are the given ones unless another number of processes began it. No batch gets larger. `method` is "sft", "dpo"
    or "kto". Raises `InputError` if the same steps cannot be taken.
    """
    team = processes()
    begun, is_whole = team.by_first(lambda: _begun(work))
    if begun == team.count:
        return dict(arguments)
    given = "per_device_train_batch_size", "gradient_accumulation_steps"
    batch_size, batches = (int(arguments[name]) for name in given)
    rows = begun * batch_size * batches
    said = f"{work}: the interrupted training was begun by {_counted(begun)}"
    if (hindrance := _hindrance(arguments, method, is_whole=is_whole)) is not None:
        raise InputError(f"{said}, and {hindrance}; start {begun} again, or remove the directory")
    if rows % team.count:
        raise InputError(f"{said} with {rows} rows in a step, which {team.count} cannot share; start {begun} again")
    own = rows // team.count
    size = next(size for size in range(batch_size, 0, -1) if own % size == 0)
    notice(f"{said}; {_counted(team.count)} now take the same {rows} rows in each step, in batches of {size}")
    return {**arguments, **dict(zip(given, (size, own // size), strict=True))}


def _begun(work: Path) -> tuple[int, bool]:
    """Return how many processes began the training, and whether each checkpoint's optimizer is in one file.

    A training that begins now is begun by those of this run, which is noted for later ones.
    """
    file = work / PROCESSES_FILE
    if not file.is_file():
        write_json(file, {"processes": processes().count})
    remedy = "write the number of processes that began the training, or remove the directory to start over"
    begun = checked_document(_Begun, read_json(file), file, remedy).processes
    return begun, all((path / "optimizer.pt").is_file() for path in _checkpoints(work))


def _checkpoints(work: Path) -> list[Path]:
    return [path.parent for path in work.glob(COMPLETE_CHECKPOINTS)]


def _hindrance(arguments: Mapping[str, Any], method: str, *, is_whole: bool) -> str | None:
    """Say why another number of processes cannot take the same steps; None if it can."""
    if method == "kto":
        return "the loss of kto compares the rows of all processes"
    if not is_whole:
        return "its optimizer is spread over them"
    names = [name for name in _HINDRANCES if arguments.get(name)]
    names += [_SAMPLING] if arguments.get(_SAMPLING) not in _FREE_ORDERS else []
    return f"args.{names[0]} orders its rows for that number" if names else None


def _counted(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
