"""One unit of the original that is held, run as several models: alone, with an adapter, or as its emulator would."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from onelayer.compiler.adapter import Adapter
from onelayer.compiler.emulator_reader import Emulator
from onelayer.compiler.experts import ExpertStacks, expert_stacks
from onelayer.compiler.moments import is_linear
from onelayer.compiler.stand_ins import Forward, standing_in
from onelayer.compiler.units import Unit, bare_name

Run = Callable[[int, Any, Any], Any]


@dataclass(frozen=True)
class Variant:
    """What a unit runs as: with the named adapter, or with an emulator's factors for weights; the original if neither.

    An emulator differs from its original in nothing but these factors, so it needs no model of its own.
    """

    adapter: str | None = None
    emulator: Emulator | None = None


def attach(adapters: Mapping[str, str | Path]) -> Callable[[PreTrainedModel], None]:
    """Lets PEFT wrap the empty model in every adapter, by name; their own small weights are real, on the host.

    The factors are then read from the files anew: for some architectures PEFT renames keys that it wrote itself, warns
    that they are missing, and goes on with random ones.
    """

    def prepare(model: PreTrainedModel) -> None:
        wrapped: Any = None
        with warnings.catch_warnings():
            # Both are PEFT's own: the keys it renamed, and a name of transformers that it should not use any more.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            for name, path in adapters.items():
                if wrapped is None:
                    # A task would give every adapter a head of its own, those too that have none in their files.
                    config = LoraConfig.from_pretrained(str(path))
                    config.task_type = None
                    wrapped = PeftModel.from_pretrained(model, path, name, config=config, low_cpu_mem_usage=True)
                else:
                    wrapped.load_adapter(path, adapter_name=name, low_cpu_mem_usage=True)
        for name, path in adapters.items():
            _fill(model, Adapter.open(path), name)
        model.eval()

    return prepare


def factor_names(module: str, embedding: bool, adapter: str) -> tuple[str, str]:
    """The parameters A and B of an adapted module, as PEFT names them in the model."""
    if embedding:
        return f"{module}.lora_embedding_A.{adapter}", f"{module}.lora_embedding_B.{adapter}"
    return f"{module}.lora_A.{adapter}.weight", f"{module}.lora_B.{adapter}.weight"


def _fill(model: PreTrainedModel, source: Adapter, adapter: str) -> None:
    for name, module in source.modules.items():
        names = factor_names(name, module.embedding, adapter)
        for parameter, key in zip(names, (module.key_a, module.key_b), strict=True):
            found = model.get_parameter(parameter)
            tensor = source.read(key)
            found.data = tensor.to(torch.float32 if found.is_meta else found.dtype)


def switching(variants: Sequence[Variant], device: torch.device) -> Callable[[Unit], Any]:
    """Runs a unit as the variant of the batch at hand: stream index i is variant i % n."""

    @contextmanager
    def around(unit: Unit) -> Iterator[Run]:
        layers = tuner_layers(unit)
        emulators = {item.emulator.directory: item.emulator for item in variants if item.emulator is not None}
        replaced = {directory: _stand_ins(unit, emulator, device) for directory, emulator in emulators.items()}

        def run(index: int, args: Any, kwargs: Any) -> Any:
            variant = variants[index % len(variants)]
            for layer in layers:
                is_tuner = isinstance(layer, BaseTunerLayer)  # the others know only adapters that replace their module
                used = variant.adapter is not None and (is_tuner or variant.adapter in layer._adapters)
                layer.enable_adapters(used)
                if used:
                    layer.set_adapter([variant.adapter] if is_tuner else variant.adapter)
            forwards = replaced[variant.emulator.directory] if variant.emulator is not None else {}
            if not forwards:
                return type(unit.module).forward(unit.module, *args, **kwargs)
            with standing_in(unit.module, forwards) as stand_in:
                return stand_in(*args, **kwargs)

        yield run

    return around


def tuner_layers(unit: Unit) -> list[Any]:
    """The modules of a unit that PEFT has wrapped."""
    return [part for part in unit.module.modules() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def named_parts(unit: Unit) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a unit with their names in the unadapted model; what PEFT wraps has that of its wrapper."""
    for name, module in unit.module.named_modules():
        yield bare_name(f"{unit.name}.{name}" if name else unit.name), module


def _stand_ins(unit: Unit, emulator: Emulator, device: torch.device) -> dict[nn.Module, Forward]:
    """What the compressed linears and experts of a unit do instead, by module."""
    found: dict[nn.Module, Forward] = {}
    for name, module in named_parts(unit):
        if name in emulator.facts.compressed and is_linear(module):
            up, down = emulator.factors(name)
            found[module] = _linear(module, up.to(device), None if down is None else down.to(device))
        stacks = expert_stacks(name, module)
        if stacks is not None and not emulator.facts.stacks.keys().isdisjoint(stacks.paths):
            found[module] = _experts(stacks, emulator, device)
    return found


def _linear(linear: nn.Module, up: torch.Tensor, down: torch.Tensor | None) -> Forward:
    bias = linear.bias
    assert bias is None or isinstance(bias, torch.Tensor)
    return lambda x: F.linear(x if down is None else F.linear(x, down), up, bias)


def _experts(stacks: ExpertStacks, emulator: Emulator, device: torch.device) -> Forward:
    """A module of experts with factors for the stacks that the emulator has as such."""
    held = {
        leaf: {ending: tensor.to(device) for ending, tensor in emulator.stack(stacks.path(leaf)).items()}
        for leaf in stacks.leaves
        if stacks.path(leaf) in emulator.facts.stacks
    }

    def product(leaf: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        if leaf not in held:
            return stacks.product(leaf, expert, x)
        up, down = emulator.expert_factors(stacks.path(leaf), held[leaf], expert)
        return F.linear(x if down is None else F.linear(x, down), up)

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        routed = stacks.routed(args, kwargs)
        assert routed is not None, f"{stacks.name} was compiled as what it is not"
        return stacks.run(*routed, product)

    return forward
