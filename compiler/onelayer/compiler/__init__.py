"""onelayer.compiler streams the original checkpoint, one unit at a time; names load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onelayer.compiler.compile import compile_emulator as compile_emulator
    from onelayer.compiler.correct import correct_adapter as correct_adapter
    from onelayer.compiler.errors import InputError as InputError
    from onelayer.compiler.evaluate import evaluate_model as evaluate_model
    from onelayer.compiler.inspect import inspect_path as inspect_path
    from onelayer.compiler.merge import merge_adapter as merge_adapter
    from onelayer.compiler.polish import polish_adapter as polish_adapter
    from onelayer.compiler.refine import refine_emulator as refine_emulator
    from onelayer.compiler.slice import slice_emulator as slice_emulator

_HOME_OF = {
    "InputError": "errors",
    "compile_emulator": "compile",
    "correct_adapter": "correct",
    "evaluate_model": "evaluate",
    "inspect_path": "inspect",
    "merge_adapter": "merge",
    "polish_adapter": "polish",
    "refine_emulator": "refine",
    "slice_emulator": "slice",
}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
