"""onelayer.compiler streams the original checkpoint, one unit at a time; names load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onelayer.compiler.machine.primitives import limit_primitives

if TYPE_CHECKING:
    from onelayer.compiler.adapters.merge import merge_adapter as merge_adapter
    from onelayer.compiler.compile.command import compile_emulator as compile_emulator
    from onelayer.compiler.correct.command import correct_adapter as correct_adapter
    from onelayer.compiler.emulators.slice import slice_emulator as slice_emulator
    from onelayer.compiler.encode.command import encode_images as encode_images
    from onelayer.compiler.errors import InputError as InputError
    from onelayer.compiler.evaluate.command import evaluate_model as evaluate_model
    from onelayer.compiler.evaluate.reference import reference_scores as reference_scores
    from onelayer.compiler.inspect import inspect_path as inspect_path
    from onelayer.compiler.polish.command import polish_adapter as polish_adapter
    from onelayer.compiler.refine.command import refine_emulator as refine_emulator
    from onelayer.compiler.sampling.command import sample_pictures as sample_pictures
    from onelayer.compiler.sources.data_set import data_set as data_set

_HOME_OF = {
    "InputError": "errors",
    "compile_emulator": "compile.command",
    "correct_adapter": "correct.command",
    "data_set": "sources.data_set",
    "encode_images": "encode.command",
    "evaluate_model": "evaluate.command",
    "inspect_path": "inspect",
    "merge_adapter": "adapters.merge",
    "polish_adapter": "polish.command",
    "reference_scores": "evaluate.reference",
    "refine_emulator": "refine.command",
    "sample_pictures": "sampling.command",
    "slice_emulator": "emulators.slice",
}
__all__ = sorted(_HOME_OF)

limit_primitives()  # before anything computes


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
