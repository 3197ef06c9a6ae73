"""Finds the checkpoint to resume an interrupted training from, among those that are complete.

The trainer writes checkpoints to `.NAME.training` next to the output. Torch-free.
"""

from pathlib import Path

from pydantic import BaseModel, PositiveInt

from onelayer.compiler.documents import checked_document
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.files import read_json
from onelayer.compiler.storage.work_directory import WorkKind

# Written last into a checkpoint. Without it, a kill in the middle of saving would leave one that looks complete.
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
    if state.global_step != _step(checkpoint):
        raise InputError(f"{file}: field global_step: is {state.global_step}; {remedy}")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def newest_checkpoint(work: Path) -> Path | None:
    """Return the checkpoint to continue from, or None."""
    complete = [file.parent for file in work.glob(COMPLETE_CHECKPOINTS)]
    return max(complete, key=_step, default=None)
