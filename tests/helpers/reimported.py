"""Imports the package again in a child process that has all libraries, which take ten times as long as the package."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from helpers.children import fork_server


def _run(code: str, argument: Any, output: str) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    for name in [name for name in sys.modules if name.partition(".")[0] == "onelayer"]:
        del sys.modules[name]
    for registry in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        registry.pop("onelayer", None)  # the package registers itself again
    with open(output, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        exec(code, {"argument": argument})


def printed_by(code: str, argument: Any, folder: Path) -> Any:
    """Return the JSON that `code` prints in a process in which no module of the package has been imported.

    The code finds `argument` under this name.
    """
    output = folder / "printed.json"
    process = fork_server().Process(target=_run, args=(code, argument, str(output)))
    process.start()
    process.join()
    assert process.exitcode == 0
    return json.loads(output.read_text(encoding="utf-8"))
