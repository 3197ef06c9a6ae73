"""A model as its library builds it, without weights: the layers, projectors and linears that compile takes of it.

Names in a checkpoint do not tell what stands between a tower and a language model, nor which matrices are linears.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Built:
    """The shapes of all parameters, tied ones once, and the names of layers, of projectors, and of linears in either.

    `config` is the config document with the fields of the text that the class knows. A linear whose weight is shared
    is left out, as compile leaves it. `value_bytes` are those of a parameter.
    """

    config: Mapping[str, Any]
    table: Mapping[str, tuple[int, ...]]
    layers: frozenset[str]
    projectors: frozenset[str]
    linears: frozenset[str]
    value_bytes: int

    @cached_property
    def below(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Parameters by the outermost unit that they are in; their names are relative to it."""
        units, found = self.layers | self.projectors, dict[str, dict[str, tuple[int, ...]]]()
        for name, shape in self.table.items():
            parts = name.split(".")
            cut = next((cut for cut in range(1, len(parts)) if ".".join(parts[:cut]) in units), None)
            if cut is not None:
                found.setdefault(".".join(parts[:cut]), {})[".".join(parts[cut:])] = shape
        return found

    def projects(self, unit: str) -> bool:
        """Return whether a unit stands alone, as a projector does; layers are in lists."""
        return unit in self.projectors or not unit.rpartition(".")[2].isdigit()

    def linears_in(self, unit: str) -> frozenset[str]:
        """Return the names of a unit's linears, relative to it; a unit that is one has the name ''."""
        inside = (name.removeprefix(unit) for name in self.linears if name == unit or name.startswith(f"{unit}."))
        return frozenset(name.removeprefix(".") for name in inside)


def is_of_several(config: Mapping[str, Any]) -> bool:
    """Whether a config document is that of a model of several models, as a tower and a language model."""
    return any(isinstance(part, Mapping) and "model_type" in part for part in config.values())


def build(directory: Path) -> Built:
    """Build the model of a directory on the meta device. Raises `InputError` if its config makes none."""
    import torch

    from onelayer.compiler.libraries import transformers_models
    from onelayer.compiler.libraries.parts import projectors
    from onelayer.compiler.models.linears import is_linear

    config = transformers_models.read_config(directory)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    model = transformers_models.empty_model(config, transformers_models.model_class(config, directory), dtype)
    layers = transformers_models.layer_modules(model)
    projecting = projectors(model, layers)
    tied = transformers_models.tied_names(model)
    # The class knows the defaults of fields that the file omits.
    named, text = {"hidden_size", "vocab_size", "num_experts_per_tok"}, config.get_text_config()
    known = {name: getattr(text, name) for name in named if isinstance(getattr(text, name, None), int)}
    modules = dict(model.named_modules())
    return Built(
        config={**config.to_dict(), **known},
        # Tied parameters are one object here, so they are listed once.
        table={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        layers=frozenset(name for name, module in modules.items() if module in layers),
        projectors=frozenset(name for name, module in modules.items() if module in projecting),
        linears=frozenset(
            name for name, module in modules.items() if is_linear(module) and f"{name}.weight" not in tied
        ),
        value_bytes=dtype.itemsize,
    )
