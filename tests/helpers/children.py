"""Child processes that have imported what they compute with and computed nothing; some are killed in the middle."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

_PASSES = [f"onelayer.compiler.{name}.command" for name in ("compile", "polish", "refine")]
_FAMILIES = [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mixtral", "qwen3_moe", "t5")]


def fork_server() -> ForkServerContext:
    """Return the context of all tests that start children: one server serves the first caller's list of imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PASSES, *_FAMILIES, "onelayer.runtime.training.trainers"])
    return context


def print_to(path: Path) -> None:
    """Let this process write to a file what it prints."""
    with open(path, "w", encoding="utf-8") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)


def at_call(place: Any, name: str, call: int, act: Callable[[], Any]) -> Callable[..., Any]:
    """Return a function that does what `place.name` does, after `act` in one of its calls."""
    real, calls = getattr(place, name), []

    def function(*arguments: Any, **keywords: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            act()
        return real(*arguments, **keywords)

    return function


def interrupt() -> None:
    """Act as Ctrl-C does."""
    raise KeyboardInterrupt


def _dying(moment: tuple[Any, str, int], run: Callable[..., Any], keywords: Mapping[str, Any], home: str) -> None:
    os.environ["ONELAYER_HOME"] = home
    torch.set_num_threads(1)
    setattr(*moment[:2], at_call(*moment, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    run(**keywords)


def killed_at(moment: tuple[Any, str, int], run: Callable[..., Any], keywords: Mapping[str, Any], home: str) -> None:
    """Run something in a child process that is killed at a moment: in a call (from 1) of an object's function."""
    process = fork_server().Process(target=_dying, args=(moment, run, keywords, home))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
