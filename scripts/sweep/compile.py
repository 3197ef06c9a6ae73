"""Checks compile and refine for the sweep: judges a tiny model's emulator, made from random tokens."""

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel

from onelayer.compiler.compile import command as compiling
from onelayer.compiler.data.batches import make_batches
from onelayer.compiler.data.tokens import Tokens
from onelayer.compiler.refine import command as refining
from onelayer.compiler.streaming import calibration as compile_data
from scripts.devices import CPU
from scripts.sweep.inputs import random_ids

SAMPLES, LENGTH = 24, 16
# Measured errors differ from the optimum only by the rounding of factors to float32.
SLACK = 1e-3


def random_tokens() -> list[Tokens]:
    """Make samples of random ids; every id is predicted."""
    rows = random_ids(SAMPLES, LENGTH).tolist()
    return [Tokens(row, row) for row in rows]


def compile_verdict(model: PreTrainedModel, device: torch.device = CPU) -> tuple[str, str]:
    """Judge a tiny model's emulator: ('optimal' | 'close' | 'worse', detail); errors pass through."""
    from onelayer.runtime import load_emulator

    with tempfile.TemporaryDirectory() as name:
        original, output = Path(name, "original"), Path(name, "emulator")
        model.save_pretrained(original)
        with (
            mock.patch.object(compile_data, "load_reader", return_value=None),
            mock.patch.object(compile_data, "read_tokens", return_value=random_tokens()),
        ):
            result = compiling.compile_emulator(original, "random", output, ratio=0.5, batch_size=4, device=device.type)
        record = json.loads((output / "emulator.json").read_text())
        emulator = load_emulator(output)
        with torch.no_grad():
            answer = emulator(**first_inputs(model))
        assert torch.isfinite(answer[0]).all(), "the emulator's output is not finite"
    excess = largest_excess(model, emulator, [item.name for item in result.linears])
    reasons = sorted({f"{item['name']}: {item['reason']}" for item in record["dense"]})
    detail = f"{len(result.linears)} linears, error at most {excess:.0e} above the optimum"
    if result.stacks:  # according to their records; tests/compiler/compile/test_expert_factors.py computes the optimum
        above = max(item.error - (item.optimal_error or 0.0) for item in result.stacks)
        completed = sum(item.fallbacks for item in result.stacks)
        detail += f"; {len(result.stacks)} stacks of experts, at most {above:.0e} above, {completed} experts completed"
        excess = max(excess, above)
    if result.layer_parameters_stacked:
        detail += f"; {result.layer_parameters_stacked:,} parameters in stacks that stay dense"
    detail += f"; {len(reasons)} dense, {reasons[0]}" if reasons else ""
    detail += f"; {len(record['revisited'])} units visited again" if record["revisited"] else ""
    # A unit that is visited again was written after its first visits, with their moments.
    return ("optimal" if excess < SLACK else "close" if record["revisited"] else "worse"), detail


def refine_verdict(model: PreTrainedModel, device: torch.device = CPU) -> tuple[str, str]:
    """Judge an emulator after some steps of every unit: ('better' | 'unmoved', detail); errors pass through."""
    from onelayer.runtime import load_emulator

    with tempfile.TemporaryDirectory() as name:
        original, begun, output = (Path(name, part) for part in ("original", "begun", "output"))
        model.save_pretrained(original)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(compile_data, "load_reader", return_value=None))
            stack.enter_context(mock.patch.object(compile_data, "read_tokens", return_value=random_tokens()))
            compiling.compile_emulator(original, "random", begun, ratio=0.4, batch_size=4, device=device.type)
            units = refining.refine_emulator(
                begun, model=original, calibration="random", output=output, steps=20, batch_size=4, device=device.type
            ).units
        with torch.no_grad():
            answer = load_emulator(output)(**first_inputs(model))
        assert torch.isfinite(answer[0]).all(), "the emulator's output is not finite"
    better = sum(unit.after < unit.before for unit in units)
    before, after = (sum(getattr(unit, when) for unit in units) / len(units) for when in ("before", "after"))
    return (
        "better" if better else "unmoved"
    ), f"{better} of {len(units)} units, mean error {before:.3f} to {after:.3f}"


def largest_excess(model: PreTrainedModel, emulator: PreTrainedModel, names: list[str]) -> float:
    """Compare the outputs of the emulator's linears with the best of their rank, by the outputs' own SVD.

    The resident original's linears see all samples again; errors are relative to their outputs Y (N, out).
    """
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: inputs[name].append([*args, *kwargs.values()][0]), with_kwargs=True
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in make_batches(random_tokens(), model.config, batch_size=4):
            model(**batch.inputs)
        for handle in handles:
            handle.remove()
        worst = 0.0
        for name in names:
            x_NI = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs[name]]).double()
            original: Any = model.get_submodule(name).double()
            copy: Any = emulator.get_submodule(name).double()
            y_NO = original(x_NI) - (0.0 if original.bias is None else original.bias)
            error = (copy(x_NI) - (0.0 if copy.bias is None else copy.bias) - y_NO).norm() / y_NO.norm()
            best = torch.linalg.svdvals(y_NO)[copy.lr_up.shape[1] :].norm() / y_NO.norm()
            worst = max(worst, float(error - best))
    return worst


def first_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Make one batch of text; encoder and decoder of a pair get the same one."""
    ids = random_ids(2, 9)
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
