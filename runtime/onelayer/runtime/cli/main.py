"""Runs the `onelayer` command as a process: each failure is one line on stderr and an exit code."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

import typer
from typer.exceptions import TyperException

from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.distributed import (
    begin_processes,
    end_processes,
    named_failure,
    processes,
    reports_failure,
)
from onelayer.runtime.cli.app import app
from onelayer.runtime.cli.command import print_error

RESUME = {
    "compile": "finished layers are kept, run the same command again to continue",
    "merge": "finished files are kept, run the same command again to continue",
    "polish": "finished steps are kept, run the same command again to continue",
    "refine": "finished layers are kept, run the same command again to continue",
    "sample": "finished denoising steps are kept, run the same command again to continue",
    "run": "finished steps are kept, run the same command again to continue",
    "train": "run the same command again with --resume to continue from the last checkpoint",
}


# What several processes of one launcher do together.
SHARED = ("compile", "correct", "evaluate", "polish", "refine", "train")

# The exit code of a command that Ctrl-C ends; typer returns it too.
INTERRUPTED = 130

# PEFT imports bitsandbytes if it is installed, which then warns about a kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 failed while running, 2 the input is wrong, 130 interrupted."""
    sys.exit(_invoke(list(sys.argv[1:] if arguments is None else arguments) or ["--help"]))


def _invoke(arguments: list[str]) -> int:
    """Run one command. Every failure ends in one line on stderr and an exit code."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        _treat_termination_as_interrupt()
        _check_launcher(arguments[0])
        begin_processes()
        code = typer.main.get_command(app).main(args=arguments, prog_name="onelayer", standalone_mode=False)
        if code != INTERRUPTED:
            end_processes()
    except TyperException as error:
        context = getattr(error, "ctx", None)  # the subcommand with the mistake
        command = context.command_path if context is not None else "onelayer"
        return _fail(f"{error.format_message().rstrip('.')} (see {command} --help)", error.exit_code)
    except InputError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if os.environ.get("ONELAYER_DEBUG"):
            raise
        named = named_failure(error)
        text = " ".join(f"{type(named).__name__}: {named}".split())
        return _fail(f"{text} (set ONELAYER_DEBUG=1 for the traceback)", 1)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    if code == INTERRUPTED and reports_failure():
        advice = RESUME.get(arguments[0], "nothing half-written is kept, run the same command again")
        typer.echo(f"onelayer: interrupted; {advice}", err=True)
    return code if isinstance(code, int) else 0


def _check_launcher(command: str) -> None:
    """Refuse a command that several processes would do twice."""
    if not processes().is_alone and command not in SHARED:
        raise InputError(f"onelayer {command}: is the work of one process; start it without torchrun")


def _treat_termination_as_interrupt() -> None:
    """Let SIGTERM, which schedulers and containers send, unwind the command and say how to continue, like Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
        signal.signal(signal.SIGTERM, interrupt)


def _fail(text: str, code: int) -> int:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends it to all when one fails
    print_error(text)
    return code
