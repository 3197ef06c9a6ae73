"""Prints the result or the error of a command."""

import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

import typer

from onelayer.compiler.errors import one_line
from onelayer.compiler.machine.distributed import processes, reports_failure


def print_result(work: Callable[[], Any], summary: Callable[[Any], str], as_json: bool) -> Any:
    """Do the work and print its result. Output of libraries goes to stderr: stdout is for the result alone."""
    with contextlib.redirect_stdout(sys.stderr):
        result = work()
        document = result if isinstance(result, dict | list) else result.model_dump(mode="json")
    if processes().is_first:
        typer.echo(
            json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) if as_json else summary(document)
        )
    return result


def print_error(text: str) -> None:
    """Print one line on stderr; of several processes the first that fails prints it."""
    if reports_failure():
        typer.echo(f"onelayer: error: {one_line(text)}", err=True)
