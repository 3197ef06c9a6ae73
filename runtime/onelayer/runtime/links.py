"""Results of a run in, the folder where a person wants them out: large files linked, small ones copied, swapped whole.

A hard link costs no space. On another disk it becomes a symbolic link into the store.
"""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from onelayer.compiler.errors import InputError
from onelayer.compiler.files import read_json, write_json

# Smaller files are copied: people edit them.
LINKED_BYTES = 1 << 20
MARK = ".onelayer.json"


def check_places(names: Iterable[str], output: Path) -> None:
    """Refuse, before any work, a folder in the way that was not put there by a run."""
    for name in names:
        if (output / name).exists() and _mark_of(output / name) is None:
            raise InputError(
                f"{output / name}: holds something that no run put there; remove it or set another `output`"
            )


def place(payloads: Mapping[str, tuple[str, Path]], output: Path) -> list[Path]:
    """Put each payload, given as (artifact key, folder), under its name below `output`; what is up to date stays.

    Raises `InputError` for a folder in the way that was not put there by this.
    """
    check_places(payloads, output)
    placed = []
    for name, (key, payload) in payloads.items():
        target = output / name
        if target.exists() and _mark_of(target) == key:
            placed.append(target)
            continue
        partial = output / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        _fill(payload, partial)
        write_json(partial / MARK, {"key": key})
        if target.exists():
            old = output / f".{name}.old"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
            os.replace(partial, target)
            shutil.rmtree(old)
        else:
            os.replace(partial, target)
        placed.append(target)
    return placed


def _fill(payload: Path, folder: Path) -> None:
    for source in sorted(payload.rglob("*")):
        target = folder / source.relative_to(payload)
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.stat().st_size < LINKED_BYTES:
            shutil.copy2(source, target)
            continue
        try:
            os.link(source, target)
        except OSError:  # another disk, or a file system without hard links
            target.symlink_to(source.resolve())


def _mark_of(folder: Path) -> str | None:
    """The key of the artifact that was put in a folder, None where none was."""
    if not (folder / MARK).is_file():
        return None
    document = read_json(folder / MARK)
    return document.get("key") if isinstance(document, dict) else None
