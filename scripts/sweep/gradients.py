"""Compares gradients for the sweep: LoRA on every linear, streamed forward and backward, and the resident model's."""

import contextlib
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.units import Unit
from onelayer.compiler.streaming import gradient_stream
from scripts.devices import CPU
from scripts.sweep.compare import first_line, first_that_runs, prepared, tensors_of
from scripts.sweep.inputs import Batch

Gradients = dict[str, torch.Tensor]
# Relative to the largest gradient of a parameter; sums over several consumers are added in a different order.
EXACT = 1e-6
ROUNDING = 1e-5


def gradient_verdict(model: PreTrainedModel, registry: str, device: torch.device = CPU) -> tuple[str, str]:
    """Judge one model: ('identical' | 'close' | 'differs', detail); failures before streaming raise."""
    return compared_gradients(model, *first_that_runs(model, registry), device)


def compared_gradients(
    model: PreTrainedModel, kind: str, batches: list[Batch], device: torch.device = CPU
) -> tuple[str, str]:
    """Judge one model on given batches, as `gradient_verdict`; `kind` says what they hold."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model.save_pretrained(directory / "model")
        _write_adapter(model, directory / "adapter")
        resident = type(model).from_pretrained(directory / "model")
        _adapt(prepared(resident), directory / "adapter")
        expected = _resident(resident, batches)
        if not any(bool(gradient.any()) for gradient in expected.values()):
            raise RuntimeError("no linear has a gradient")
        streamed = StreamedModel(directory / "model", lambda empty: _adapt(empty, directory / "adapter"))
        found, loads = _streamed(streamed, batches, device)
    worst, place = _distance(found, expected)
    detail = f"{kind}; {len(expected)} factors; at most {max(loads.values())} loads of a unit"
    if worst == 0.0:
        return "identical", detail
    detail = f"{worst:.1e} in {place}; {detail}"
    if worst > EXACT and model.dtype == torch.float32:
        # A higher precision shrinks rounding, but not a mistake.
        try:
            finer_batches = [{name: _doubled(value) for name, value in batch.items()} for batch in batches]
            result, finer = compared_gradients(model.double(), kind, finer_batches, device)
        except Exception as error:  # some models compute a part in float32 in any dtype
            result, finer = "close" if worst <= ROUNDING else "differs", first_line(error)
        return "differs" if result == "differs" else "close", f"{detail}; in float64: {finer}"
    return ("close" if worst <= EXACT else "differs"), detail


def _doubled(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value


def _distance(found: Gradients, expected: Gradients) -> tuple[float, str]:
    """Find the largest difference of any gradient, relative to its largest value, and its parameter."""
    worst, place = 0.0, ""
    # A gradient that should vanish (attention to a single token) is rounding; it is compared with the others' size.
    least = 1e-3 * max(float(gradient.abs().max()) for gradient in expected.values())
    for parameter, gradient in expected.items():
        ours = found.get(parameter, torch.zeros_like(gradient)).double()
        distance = float((ours - gradient.double()).abs().max() / gradient.abs().max().clamp_min(least))
        if not distance <= worst:
            worst, place = distance, parameter
    return worst, place


def _write_adapter(model: PreTrainedModel, directory: Path) -> None:
    """Save random factors on every linear except the head and those that PEFT refuses to adapt."""
    heads = {model.get_output_embeddings()} if hasattr(model, "get_output_embeddings") else set()
    targets = [
        name for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D) and part not in heads
    ]
    transposed = any(isinstance(part, Conv1D) for part in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while True:
            config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=transposed)
            try:
                adapted: Any = peft.get_peft_model(model, config)
                break
            except ValueError as error:  # it names the modules that it refuses
                refused = set(re.findall(r"'(\w+)'", str(error)))
                kept = [name for name in targets if name.rpartition(".")[2] not in refused]
                if kept == targets:
                    raise
                targets = kept
        adapted.save_pretrained(str(directory), save_embedding_layers=False)
        adapted.unload()


def _adapt(model: PreTrainedModel, directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.PeftModel.from_pretrained(model, directory, is_trainable=True)
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        key = re.sub(r"\.weight$", ".default.weight", name.removeprefix("base_model.model."))
        if not torch.equal(model.get_parameter(key), tensor):
            raise RuntimeError(f"PEFT does not restore {key} from the file that it wrote")
    model.eval()


def _loss(output: Any, batch: Batch) -> torch.Tensor:
    """Weight every number of the output unevenly, so that every gradient counts; equal for the same batch."""
    total = torch.zeros(())
    index = sum(value.numel() for value in batch.values())
    for place, tensor in enumerate(tensors_of(output)):
        if tensor.is_floating_point() and tensor.requires_grad:
            weights = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(100 * index + place))
            total = total + (tensor.nan_to_num(0, 0, 0) * weights).sum()
    return total


def _resident(model: PreTrainedModel, batches: list[Batch]) -> Gradients:
    for parameter in model.parameters():
        parameter.grad = None
    for batch in batches:
        loss = _loss(model(**batch), batch)
        if loss.requires_grad:
            loss.backward()
    return _collected(model)


def _collected(model: PreTrainedModel) -> Gradients:
    named = ((name, parameter) for name, parameter in model.named_parameters() if ".lora_" in name)
    return {name: parameter.grad.cpu() for name, parameter in named if parameter.grad is not None}


def _streamed(streamed: StreamedModel, batches: list[Batch], device: torch.device) -> tuple[Gradients, Counter[str]]:
    loads: Counter[str] = Counter()

    @contextlib.contextmanager
    def on_unit(unit: Unit) -> Iterator[None]:
        loads[unit.name] += 1
        yield

    def consume(index: int, output: Any) -> None:
        with torch.enable_grad():
            loss = _loss(output, batches[index])
            if loss.requires_grad:
                loss.backward(retain_graph=True)

    # Both run in evaluation mode: dropout would draw different numbers.
    as_it_is = mock.patch.object(gradient_stream, "training", return_value=contextlib.nullcontext())
    with as_it_is, Meter(device) as meter:
        stream = gradient_stream.GradientStream(streamed, device, meter, on_unit=on_unit, trained=len(batches))
        with stream:
            stream.run(batches, consume)
            stream.reverse()
    return _collected(streamed.model), loads
