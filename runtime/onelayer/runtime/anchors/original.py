"""The original with the adapter that is trained on its emulator: the same parameters, not a copy of them."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onelayer.compiler.emulators.facts import EmulatorFacts
from onelayer.compiler.errors import InputError
from onelayer.compiler.libraries.modules import owner_of
from onelayer.compiler.machine.devices import forked_random
from onelayer.compiler.models.linears import is_linear
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.units import Unit, set_tensor


class AdaptedOriginal:
    """The original in `directory`, streamed, with the adapter of `adapted`, a PEFT model of its emulator."""

    def __init__(self, directory: Path, adapted: PeftModel) -> None:
        self._adapted = adapted
        self.streamed = StreamedModel(directory, self._attach)
        if unknown := self.trained.keys() - dict(self.streamed.model.named_parameters()).keys():
            raise InputError(f"{directory}: has no {min(unknown)}, which is trained; train without anchors")

    def _attach(self, empty: PreTrainedModel) -> None:
        config: Any = copy.deepcopy(self._adapted.peft_config[self._adapted.active_adapter])
        config.task_type = None  # a task adds a head by name; the modules to save are in the configuration already
        config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in empty.modules())
        with forked_random(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, about ties and Conv1D
            get_peft_model(empty, config, self._adapted.active_adapter, low_cpu_mem_usage=True)
        empty.eval()

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        base = self._adapted.get_base_model()
        return {name: parameter for name, parameter in base.named_parameters() if parameter.requires_grad}

    def share_adapter(self) -> None:
        """Let the original use the trained parameters themselves, as they are now and as they will be."""
        for name, parameter in self.trained.items():
            set_tensor(*owner_of(self.streamed.model, name), parameter)


def compressed_units(streamed: StreamedModel, facts: EmulatorFacts) -> dict[str, Unit]:
    """List the units, by name, that hold something the emulator has compressed, in module order.

    Raises `InputError` if the emulator has compressed something outside of every unit.
    """
    names = [*facts.compressed, *facts.stacks]
    found = {
        unit.name: unit
        for unit in streamed.units
        if any(name == unit.name or name.startswith(f"{unit.name}.") for name in names)
    }
    for name in names:
        if not any(name == unit or name.startswith(f"{unit}.") for unit in found):
            raise InputError(f"{name}: is compressed, and in no unit of the original; train without anchors")
    return found


def emulated_modules(adapted: PeftModel, units: Mapping[str, Unit]) -> dict[str, nn.Module]:
    """Return the emulator's module for each unit. Raises `InputError` if it has no such module of the same kind."""
    modules = dict(adapted.get_base_model().named_modules())
    for name, unit in units.items():
        if unit.is_block and not is_linear(unit.module) and type(modules.get(name)) is not type(unit.module):
            kind = type(modules[name]).__name__ if name in modules else "absent"
            raise InputError(
                f"{name}: is {type(unit.module).__name__} in the original and {kind} in the emulator; train without "
                "anchors"
            )
    return {name: modules[name] for name in units}
