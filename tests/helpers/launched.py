"""Runs a command in several processes that find each other as those of `torchrun` do, without its start-up time."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from helpers.children import fork_server

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


def run_command(arguments: Sequence[str]) -> None:
    """Run `onelayer ARGUMENTS`."""
    from onelayer.runtime.cli.main import main

    torch.set_num_threads(1)
    main(arguments)


def _child(rank: int, count: int, port: int, work: Work, arguments: Sequence[str], home: str, directory: str) -> None:
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in launched.items()}
    os.environ |= {"ONELAYER_HOME": home, "HF_HUB_OFFLINE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with open(Path(directory) / f"printed-{rank}", "w", encoding="utf-8") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
        work(arguments)


def launch(
    count: int,
    arguments: Sequence[Any],
    directory: Path,
    kill: tuple[int, Path] | None = None,
    work: Work = run_command,
) -> Launched:
    """Run `onelayer ARGUMENTS`, or other work, in `count` processes. With `kill`, kill one when a path exists."""
    distributed: Any = torch.distributed
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's agent holds it
    directory.mkdir(parents=True, exist_ok=True)
    shared = (count, store.port, work, [str(item) for item in arguments], os.environ["ONELAYER_HOME"], str(directory))
    children = [fork_server().Process(target=_child, args=(rank, *shared)) for rank in range(count)]
    for child in children:
        child.start()
    if kill is not None:
        rank, path = kill
        while not path.exists() and children[rank].is_alive():
            time.sleep(0.01)
        children[rank].kill()
    wait([child.sentinel for child in children], MOST_SECONDS)
    started = time.monotonic()
    for child in children:
        child.join(MOST_SECONDS)
        if child.is_alive():
            child.kill()
            sys.exit(f"a process did not end within {MOST_SECONDS} s")
    seconds = time.monotonic() - started
    printed = "".join((directory / f"printed-{rank}").read_text(encoding="utf-8") for rank in range(count))
    return Launched([child.exitcode if child.exitcode is not None else -1 for child in children], printed, seconds)
