"""Runs a command in several processes that find each other as those of `torchrun` do, without its start-up time.

They are forked from a process that has run some commands before, so that they are as quick as if they had.
"""

import atexit
import contextlib
import gc
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from helpers.children import fork_server, print_to

# Above any run of these tests; a process that hangs is killed then.
MOST_SECONDS = 300
# What a process does with its arguments. It is sent to the process, so it has to be importable from there.
Work = Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class Launched:
    """The exit codes of the processes, what they printed together, and the seconds from the first end to the last."""

    codes: list[int]
    printed: str
    seconds: float


def written(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(**fields: Any) -> list[Any]:
    """Return command-line options of these names; one that is True has no value."""
    return [
        part
        for name, value in fields.items()
        for part in (f"--{name.replace('_', '-')}", *(() if value is True else (value,)))
    ]


def run_command(arguments: Sequence[str]) -> None:
    """Run `onelayer ARGUMENTS`."""
    from onelayer.runtime.cli.main import main

    main(arguments)


def _child(rank: int, count: int, port: int, work: Work, arguments: Sequence[str], home: str, directory: str) -> None:
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in launched.items()}
    os.environ |= {"ONELAYER_HOME": home, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    print_to(Path(directory) / f"printed-{rank}")
    work(arguments)


def _serve(connection: Connection) -> None:
    """Run some commands; then run what is asked for in forked processes, and answer with exit codes and seconds."""
    # A process that has computed gradients on a GPU cannot be forked.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    _warm_up()
    gc.freeze()  # as in the process of the tests: see tests/conftest.py
    forked = multiprocessing.get_context("fork")
    with contextlib.suppress(EOFError):
        while True:
            count, *shared = connection.recv()
            children = [forked.Process(target=_child, args=(rank, count, *shared)) for rank in range(count)]
            for child in children:
                child.start()
            wait([child.sentinel for child in children], MOST_SECONDS)
            started = time.monotonic()
            for child in children:
                child.join(MOST_SECONDS)
                child.kill()
                child.join()
            connection.send(([child.exitcode for child in children], time.monotonic() - started))


def _warm_up() -> None:
    from helpers.tiny_models import causal, tiny_tokenizer

    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        os.environ["ONELAYER_HOME"] = name
        print_to(path / "printed")
        causal("Llama", num_hidden_layers=1).save_pretrained(path / "model")
        tiny_tokenizer(path / "model")
        (path / "data.jsonl").write_text(json.dumps({"text": "the quick brown fox"}))
        rows, calibration = ("--data", path / "data.jsonl"), ("--calibration", path / "data.jsonl")
        for command in (
            ("compile", path / "model", *calibration, "--ratio", "0.5", "--output", path / "emulator"),
            ("evaluate", path / "model", *rows, "--against", path / "emulator"),
            ("polish", "--model", path / "model", *rows, "--lora-rank", "2", "--steps", "1", "--output", path / "out"),
        ):
            with contextlib.suppress(SystemExit):
                run_command([str(part) for part in command])


@cache
def _server() -> Connection:
    """Start the process that others are forked from; it ends with this one."""
    here, there = multiprocessing.Pipe()
    fork_server().Process(target=_serve, args=(there,)).start()
    there.close()
    atexit.register(here.close)
    return here


def launch(count: int, arguments: Sequence[Any], directory: Path, work: Work = run_command) -> Launched:
    """Run `onelayer ARGUMENTS`, or other work, in `count` processes."""
    distributed: Any = torch.distributed
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's agent holds it
    directory.mkdir(parents=True, exist_ok=True)
    given = [str(item) for item in arguments]
    _server().send((count, store.port, work, given, os.environ["ONELAYER_HOME"], str(directory)))
    codes, seconds = _server().recv()
    printed = "".join((directory / f"printed-{rank}").read_text(encoding="utf-8") for rank in range(count))
    return Launched(codes, printed, seconds)
