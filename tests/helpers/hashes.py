"""Hashes of the files of a directory."""

import json
from pathlib import Path

from onelayer.compiler.storage.digests import sha256_file


def hashes(directory: Path) -> dict[str, str]:
    """Hash every file by content; `emulator.json` without measured figures."""
    found = {file.name: sha256_file(file) for file in directory.iterdir() if file.name != "emulator.json"}
    document = json.loads((directory / "emulator.json").read_text())
    del document["report"]
    return {**found, "emulator.json": json.dumps(document)}


def tree_hashes(directory: Path) -> dict[str, str]:
    """Hash every file below a directory by content."""
    files = (file for file in sorted(directory.rglob("*")) if file.is_file())
    return {file.relative_to(directory).as_posix(): sha256_file(file) for file in files}
