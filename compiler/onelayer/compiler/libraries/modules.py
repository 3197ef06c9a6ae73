"""What both libraries' models have in common as modules, and how a checkpoint's tensors are assigned to parameters."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from onelayer.compiler.errors import InputError

# The floating dtypes of weights by their safetensors names, as in `FLOAT_NAMES`.
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def owner_of(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """Return the module that holds the parameter or buffer `name`, and its attribute in that module."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def has_forward(module: torch.nn.Module) -> bool:
    """Whether a module has a forward of its own; lists and other containers have none."""
    return type(module).forward is not torch.nn.Module.forward


def modules_in_lists(model: torch.nn.Module) -> frozenset[torch.nn.Module]:
    """Return the modules in the outermost `ModuleList`s: the repeated layers of a model that declares none."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    inner = {part for module in lists for part in module.modules() if part is not module}
    return frozenset(part for module in lists if module not in inner for item in module for part in _callable(item))


def _callable(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    if has_forward(module):
        yield module
    else:
        for child in module.children():
            yield from _callable(child)


@dataclass(frozen=True)
class LoadPlan:
    """Which checkpoint keys make which parameters.

    `checkpoint_keys[name]` are the checkpoint keys of a runtime name. `stored_unchanged` are the names that are one
    stored tensor, at most renamed, with no operation on it. `alias[name]` is the tied parameter that is stored instead.
    """

    checkpoint_keys: dict[str, tuple[str, ...]]
    stored_unchanged: frozenset[str]
    alias: dict[str, str]


def missing_parameters(model: torch.nn.Module, plan: LoadPlan) -> list[str]:
    """List the parameters that neither the checkpoint nor a tie provides."""
    known = plan.checkpoint_keys.keys() | plan.alias.keys()
    return [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in known]


def refuse_missing(model: torch.nn.Module, missing: list[str], directory: Path) -> None:
    """Raise `InputError` naming the first of the missing parameters, if there are any."""
    if missing:
        raise InputError(
            f"{directory}: {len(missing)} parameters of {type(model).__name__} are not in the checkpoint, "
            f"{missing[0]!r} first; give a checkpoint of this class"
        )


def refuse_quantized(key: str, stored_as: str, expected: torch.Tensor) -> None:
    """Raise `InputError` if a tensor that makes a floating parameter holds integers or packed values."""
    if stored_as not in FLOAT_DTYPES and expected.is_floating_point():
        raise InputError(f"tensor {key}: {stored_as} are quantized values; give the unquantized original")
