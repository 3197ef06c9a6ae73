"""Finds the checkpoint to resume an interrupted training from, among those that are complete.

The trainer writes checkpoints to `.NAME.training` next to the output. Torch-free.
"""

from pathlib import Path

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


def newest_checkpoint(work: Path) -> Path | None:
    """Return the checkpoint to continue from, or None."""
    complete = [file.parent for file in work.glob(COMPLETE_CHECKPOINTS)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
