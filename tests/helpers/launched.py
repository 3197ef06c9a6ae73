"""Runs a command in several processes that find each other as those of `torchrun` do, without its start-up time."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from helpers.children import fork_server

# Above any run of these tests; a process that hangs is killed then.
MOST_SECONDS = 300


@dataclass(frozen=True)
class Launched:
    """The exit codes of the processes, what they printed together, and the seconds until the last one ended."""

    codes: list[int]
    printed: str
    seconds: float


def _child(rank: int, count: int, port: int, arguments: Sequence[str], home: str, directory: str) -> None:
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in launched.items()}
    os.environ |= {"ONELAYER_HOME": home, "HF_HUB_OFFLINE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with open(Path(directory) / f"printed-{rank}", "w", encoding="utf-8") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
        from onelayer.runtime.cli.main import main

        torch.set_num_threads(1)
        main(arguments)


def launch(count: int, arguments: Sequence[Any], directory: Path, kill: tuple[int, Path] | None = None) -> Launched:
    """Run `onelayer ARGUMENTS` in `count` processes. With `kill`, kill one of them when a path exists."""
    distributed: Any = torch.distributed
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's agent holds it
    directory.mkdir(parents=True, exist_ok=True)
    shared = (count, store.port, [str(item) for item in arguments], os.environ["ONELAYER_HOME"], str(directory))
    children = [fork_server().Process(target=_child, args=(rank, *shared)) for rank in range(count)]
    for child in children:
        child.start()
    started = time.monotonic()
    if kill is not None:
        rank, path = kill
        while not path.exists() and children[rank].is_alive():
            time.sleep(0.01)
        children[rank].kill()
        started = time.monotonic()
    for child in children:
        child.join(MOST_SECONDS)
        if child.is_alive():
            child.kill()
            sys.exit(f"a process did not end within {MOST_SECONDS} s")
    seconds = time.monotonic() - started
    printed = "".join((directory / f"printed-{rank}").read_text(encoding="utf-8") for rank in range(count))
    return Launched([child.exitcode if child.exitcode is not None else -1 for child in children], printed, seconds)
