"""Makes the real model's task from Python's standard library: answer a question about a function with its manual page.

Functions, their arguments and the first sentence of their documentation are read from source files; nothing is
imported. Whole modules are held out, so that no test question has a neighbor among the training rows.
"""

import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onelayer.compiler.storage.files import write_text
from scripts.demo.data import NOT_CODE, SEED

TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS = 360, 16, 32
SHORTEST, LONGEST = 20, 90  # characters of a first sentence and of a call that fit the length of the passes
SHOWN = "shutil.move("  # its whole module is held out, and in neither validation nor test rows


@dataclass(frozen=True)
class Function:
    """A public function of the standard library: `module`, `call` with its arguments, and what it does."""

    module: str
    call: str
    does: str

    @property
    def question(self) -> str:
        """What a user asks."""
        return f"What does {self.module}.{self.call} do?"

    @property
    def page(self) -> str:
        """The answer, in the form of a manual page."""
        name = self.call.partition("(")[0]
        return (
            f"NAME\n    {name} - {self.does}\n\nSYNOPSIS\n    from {self.module} import {name}\n    {self.call}\n\n"
            f"SEE ALSO\n    help({self.module})"
        )


def write_pages(directory: Path) -> None:
    """Write `manual` as train, validation and test JSONL, and the question to show as `question.json`."""
    by_module: dict[str, list[Function]] = {}
    for function in functions():
        by_module.setdefault(function.module, []).append(function)
    shown = next(function for function in by_module["shutil"] if f"{function.module}.{function.call}".startswith(SHOWN))
    modules = sorted(by_module.keys() - {"shutil"})
    random.Random(SEED).shuffle(modules)
    parts = {"validation": modules[1::8], "test": modules[::4]}
    parts["train"] = [module for index, module in enumerate(modules) if index % 8 not in (0, 1, 4)]
    for name, count in (("train", TRAIN_ROWS), ("validation", VALIDATION_ROWS), ("test", TEST_ROWS)):
        rows = [function for module in parts[name] for function in by_module[module]]
        random.Random(SEED).shuffle(rows)
        lines = [json.dumps({"messages": _messages(function)}) + "\n" for function in rows[:count]]
        write_text(directory / f"manual.{name}.jsonl", "".join(lines))
    write_text(directory / "question.json", json.dumps(_messages(shown)[:1]))


def functions() -> Iterator[Function]:
    """List the documented public functions of the standard library whose page is short, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if NOT_CODE & set(parts) or any(part.startswith("_") for part in parts):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8", errors="ignore")).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            paragraph = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
            does, call = paragraph.partition(". ")[0].rstrip("."), f"{node.name}({ast.unparse(node.args)})"
            if SHORTEST <= len(does) <= LONGEST and len(call) <= LONGEST:
                yield Function(".".join(parts), call, does)


def _messages(function: Function) -> list[dict[str, str]]:
    return [{"role": "user", "content": function.question}, {"role": "assistant", "content": function.page}]
