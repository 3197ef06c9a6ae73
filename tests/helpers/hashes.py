"""An emulator's files by content."""

import json
from pathlib import Path

from onelayer.compiler.storage.digests import sha256_file


def hashes(directory: Path) -> dict[str, str]:
    """Every file by content; `emulator.json` without what was measured."""
    found = {file.name: sha256_file(file) for file in directory.iterdir() if file.name != "emulator.json"}
    document = json.loads((directory / "emulator.json").read_text())
    del document["report"]
    return {**found, "emulator.json": json.dumps(document)}
