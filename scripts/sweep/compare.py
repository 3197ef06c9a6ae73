"""Compares outputs for the sweep: those of a resident model and of its streamed directory, for the same batches."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.machine.transfers import Transfers
from onelayer.compiler.models.deferred_logits import DeferredLogits
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.units import Unit
from onelayer.compiler.streaming import stream
from scripts.devices import CPU
from scripts.sweep.inputs import Batch, candidates


def first_line(error: Exception) -> str:
    """Return the message of an error in one line."""
    return (str(error).strip().splitlines() or [""])[0][:150]


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    """Switch off the cache, as streaming does, and gradients, with which some products are computed differently."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if "use_cache" in getattr(config, "__dict__", {}):
            config.use_cache = False  # type: ignore[union-attr]
    model.requires_grad_(False)
    model.eval()
    return model


def outputs_of(model: PreTrainedModel, batches: list[Batch]) -> list[list[torch.Tensor]]:
    """Collect every tensor of the model's output for each batch."""
    with torch.no_grad():
        return [tensors_of(model(**batch)) for batch in batches]


def tensors_of(output: Any) -> list[torch.Tensor]:
    """List the tensors of an output in order; deferred logits are computed."""
    leaves = tree_leaves(output.to_tuple() if hasattr(output, "to_tuple") else output)
    return [
        leaf.materialize() if isinstance(leaf, DeferredLogits) else leaf
        for leaf in leaves
        if isinstance(leaf, torch.Tensor)
    ]


def first_that_runs(model: PreTrainedModel, registry: str) -> tuple[str, list[Batch]]:
    """Return the first batches that the resident model accepts, preferably with images or sound that matter."""
    failures: list[str] = []
    ignored: list[tuple[str, list[Batch]]] = []
    for kind, batches in candidates(model, registry):
        try:
            answers = outputs_of(model, batches)
            if kind != "text" and not difference(answers, outputs_of(model, [turned(batch) for batch in batches])):
                ignored.append((f"{kind} (hardly any effect)", batches))
                continue
        except TimeoutError:
            raise
        except Exception as error:
            failures.append(f"{type(error).__name__}: {first_line(error)}")
            continue
        if kind == "text" and (ignored or failures):
            return ignored[0] if ignored else (f"text (not more: {failures[0]})", batches)
        return kind, batches
    if ignored:
        return ignored[0]
    raise RuntimeError("; ".join(dict.fromkeys(failures)))


def turned(batch: Batch) -> Batch:
    """Flip images and sound of the batch; patches that begin with their positions are negated instead."""

    def one(name: str, value: torch.Tensor) -> torch.Tensor:
        if name == "flattened_patches":
            return torch.cat([value[..., :2], -value[..., 2:]], dim=-1)
        return value.flip(-1) if value.is_floating_point() else value

    return {name: one(name, value) for name, value in batch.items()}


def difference(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> float:
    """Compute the largest difference of any tensor, relative to its largest value; infinite if shapes differ."""
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if [item.shape for item in ours] != [item.shape for item in theirs]:
            return float("inf")
        for one, other in zip(ours, theirs, strict=True):
            if not torch.equal(one, other):
                one, other = one.double(), other.double()
                same = (one == other) | (one.isnan() & other.isnan())
                distance = (one - other).abs().masked_fill(same, 0.0)
                worst = max(worst, float(distance.max() / other[other.isfinite()].abs().max().clamp_min(1e-12)))
    return worst


def streamed_outputs(
    directory: Path, batches: list[Batch], device: torch.device = CPU
) -> tuple[list[list[torch.Tensor]], Counter[str], StreamedModel]:
    """Stream batches to another device, which shares nothing with the host; return outputs and loads by unit.

    The host itself is treated as such a device: it computes with copies.
    """
    outputs: dict[int, Any] = {}
    loads: Counter[str] = Counter()
    streamed = StreamedModel(directory)

    @contextlib.contextmanager
    def on_unit(unit: Unit) -> Iterator[None]:
        loads[unit.name] += 1
        yield

    def copied(_: Transfers, values: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda x: x.clone() if type(x) is torch.Tensor else x, values)

    on_host = mock.patch.multiple(Transfers, upload=copied, download=copied)
    with Meter(device) as meter, on_host if device == CPU else contextlib.nullcontext():
        stream.Stream(streamed, device, meter, on_unit=on_unit).run(batches, outputs.__setitem__)
    return [tensors_of(outputs[index]) for index in range(len(batches))], loads, streamed


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the model with its weights 16 bytes after their usual addresses."""
    for parameter in model.parameters():
        skip = 16 // parameter.element_size()
        place = torch.empty(parameter.numel() + skip, dtype=parameter.dtype)[skip:].view(parameter.shape)
        parameter.data = place.copy_(parameter.data)
    return model
