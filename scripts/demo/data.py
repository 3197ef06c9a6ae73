"""Makes the demo's training data from text that ships with Python: source code, and two tasks that differ from it.

The tasks are the prose of the language reference (`pydoc_data/topics.py`) and the tables of character encodings
(`encodings/*.py`). Both are kept out of the code that the model is first trained on.
"""

import json
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

from onelayer.compiler.storage.files import write_text

SEED = 0
# Some distributions package tests, idlelib and similar parts separately; without them the text is the same everywhere.
NOT_CODE = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
TASK_FOLDERS = {"encodings", "pydoc_data"}
# A window fills the 128 tokens that all passes of the demo use; tables take more tokens per character than prose.
CODE_CHARACTERS, DOCS_CHARACTERS, TABLE_CHARACTERS = 600, 560, 400
TRAIN_WINDOWS, VALIDATION_WINDOWS, TEST_WINDOWS, CALIBRATION_WINDOWS = 640, 48, 96, 32


def standard_library() -> list[str]:
    """List the source files of Python's standard library without those of the tasks, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = NOT_CODE | TASK_FOLDERS
    files = [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]
    return [path.read_text(encoding="utf-8", errors="ignore") for path in files]


def write_tasks(directory: Path, code: Sequence[str]) -> None:
    """Write `docs` and `charmaps` as train, validation and test JSONL, and the calibration mix of all three texts."""
    docs = [topics[name] for name in sorted(topics)]
    encodings = sorted((Path(sysconfig.get_path("stdlib")) / "encodings").glob("*.py"))
    tables = [path.read_text(encoding="utf-8") for path in encodings]
    tables = [table for table in tables if "decoding_table = (" in table]
    mix = windows(code, CODE_CHARACTERS)[:CALIBRATION_WINDOWS]
    for task, texts, characters in (("docs", docs, DOCS_CHARACTERS), ("charmaps", tables, TABLE_CHARACTERS)):
        # Whole topics and whole files are held out, not windows: neighbors of a training window would be too easy.
        train = windows([text for index, text in enumerate(texts) if index % 8 not in (0, 1, 4)], characters)
        seen = set(train)
        for name, held_out, count in (
            ("validation", texts[1::8], VALIDATION_WINDOWS),
            ("test", texts[::4], TEST_WINDOWS),
        ):
            new = [window for window in windows(held_out, characters) if window not in seen]
            seen.update(new)
            write_windows(directory / f"{task}.{name}.jsonl", new[:count])
        write_windows(directory / f"{task}.train.jsonl", train[:TRAIN_WINDOWS])
        mix += train[:CALIBRATION_WINDOWS]
    write_windows(directory / "calibration.jsonl", mix)


def windows(texts: Sequence[str], characters: int) -> list[str]:
    """Cut the text into windows of whole lines of a least length, none twice, in a shuffled but fixed order."""
    found: dict[str, None] = {}
    for text in texts:
        window = ""
        for line in text.splitlines(keepends=True):
            window += line
            if len(window) >= characters:
                found[window] = None
                window = ""
    shuffled = list(found)
    random.Random(SEED).shuffle(shuffled)
    return shuffled


def write_windows(path: Path, texts: Sequence[str]) -> None:
    """Write one JSON object per line."""
    write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
