"""Finds the checkpoint to resume an interrupted training from, among those that are complete.

The trainer writes checkpoints to `.NAME.training` next to the output. Torch-free.
"""

import shutil
from pathlib import Path

from pydantic import BaseModel, PositiveInt

from onelayer.compiler.documents import checked_document
from onelayer.compiler.errors import InputError
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
    """Return what an interrupted run measured on its first batch, or None."""
    file = work / FIRST_BATCH_FILE
    return FirstBatch.model_validate(read_json(file)) if file.is_file() else None


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
