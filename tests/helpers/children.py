"""Child processes that have imported what they compute with and computed nothing."""

import multiprocessing
from multiprocessing.context import ForkServerContext

_PASSES = [f"onelayer.compiler.{name}.command" for name in ("compile", "polish", "refine")]
_FAMILIES = [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mixtral", "qwen3_moe", "t5")]


def fork_server() -> ForkServerContext:
    """Return the context of all tests that start children: one server serves the first caller's list of imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PASSES, *_FAMILIES, "onelayer.runtime.training.trainers"])
    return context
