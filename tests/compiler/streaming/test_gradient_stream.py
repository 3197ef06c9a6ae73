"""Streamed gradients compared with the resident model's: exact, each unit read twice, no growth with depth."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel

from helpers.resident_gradients import adapted
from helpers.tiny_models import TINY, VOCAB, tiny_llama
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.deferred_logits import DeferredLogits
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.units import Unit
from onelayer.compiler.streaming import spill
from onelayer.compiler.streaming.gradient_stream import GradientStream
from onelayer.compiler.streaming.spill import SpillPool
from onelayer.compiler.streaming.stream import BatchError

CPU = torch.device("cpu")
Gradients = dict[str, torch.Tensor]


def save_adapted(name: str, directory: Path, **settings: Any) -> Any:
    """Save a tiny model and a random adapter for it; return the two together, resident."""
    resident = adapted(name, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resident.save_pretrained(directory / "adapter")
    clean = resident.unload()
    clean.save_pretrained(directory / "model")
    return load(type(clean).from_pretrained(directory / "model"), directory / "adapter")


def load(model: PreTrainedModel, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).train()


def open_streamed(directory: Path) -> StreamedModel:
    return StreamedModel(directory / "model", lambda model: load(model, directory / "adapter") and None)


def batches_for(name: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    if name == "vit":
        return [{"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)} for rows in (2, 1)]
    batches = []
    for rows, length in ((2, 7), (1, 12), (3, 9)):
        batch = {"input_ids": torch.randint(3, VOCAB, (rows, length), generator=generator)}
        if name == "t5":
            batch["decoder_input_ids"] = torch.randint(3, VOCAB, (rows, length // 2), generator=generator)
        batches.append(batch)
    return batches


def some_loss(index: int, output: Any) -> torch.Tensor:
    """Weight every logit differently, so that every gradient counts."""
    logits = output.logits
    logits = logits.materialize() if isinstance(logits, DeferredLogits) else logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(index))
    return (logits * weights).sum()


def resident_gradients(model: Any, batches: list[dict[str, torch.Tensor]]) -> Gradients:
    model.zero_grad()
    for index, batch in enumerate(batches):
        some_loss(index, model.base_model.model(**batch)).backward()
    return collected(model)


def collected(model: Any) -> Gradients:
    return {
        name.removeprefix("base_model.model."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }


def streamed_gradients(streamed: StreamedModel, batches: list[dict[str, torch.Tensor]], **fields: Any) -> Gradients:
    def consume(index: int, output: Any) -> None:
        with torch.enable_grad():
            some_loss(index, output).backward()

    with Meter(CPU) as meter, GradientStream(streamed, CPU, meter, trained=len(batches), **fields) as stream:
        stream.run(batches, consume)
        stream.reverse()
    return collected(streamed.model)


def check_equal(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        # Where several consumers' gradients add up, their order differs; how far depends on the number of threads.
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=4e-6 * max(scale, 1e-3), msg=name)


@pytest.mark.parametrize("name", [*TINY, "vit"])
def test_gradients_equal_the_resident_models(name: str, tmp_path: Path) -> None:
    resident = save_adapted(name, tmp_path)
    expected = resident_gradients(resident, batches_for(name))
    loads: Counter[str] = Counter()
    streamed = open_streamed(tmp_path)

    @contextmanager
    def on_unit(unit: Unit) -> Iterator[None]:
        loads[unit.name] += 1
        yield

    check_equal(streamed_gradients(streamed, batches_for(name), on_unit=on_unit), expected)
    trained = {unit.name for unit in streamed.units if any(p.requires_grad for p in unit.module.parameters())}
    assert trained
    assert all(loads[name] == 2 for name in trained)
    assert all(count <= 2 for count in loads.values())


def test_the_units_at_the_turns_are_read_once(tmp_path: Path) -> None:
    save_adapted("llama", tmp_path)
    streamed = open_streamed(tmp_path)
    first = next(unit for unit in streamed.units if unit.is_block)
    batches = batches_for("llama")
    rows_bytes = sum(len(torch.unique(batch["input_ids"])) for batch in batches) * 32 * 4
    with Meter(CPU) as meter, GradientStream(streamed, CPU, meter, trained=len(batches)) as stream:
        found = []
        for _ in range(3):
            before = streamed.checkpoint.bytes_read
            stream.run(batches, send_back)
            stream.reverse()
            found.append(streamed.checkpoint.bytes_read - before)
    norm_bytes = 32 * 4
    # Forward all, back all but the last, which is the norm after the blocks; then the first block waits for the next.
    whole = sum(unit.weight_bytes for unit in streamed.units)
    assert found == [
        2 * whole - norm_bytes + rows_bytes,
        *([2 * whole - norm_bytes - first.weight_bytes + rows_bytes] * 2),
    ]


def send_back(index: int, output: Any) -> None:
    with torch.enable_grad():
        output.logits.hidden.sum().backward()


def test_dropout_is_the_same_when_a_unit_runs_again(tmp_path: Path) -> None:
    save_adapted("llama", tmp_path, lora_dropout=0.5)
    found = [streamed_gradients(open_streamed(tmp_path), batches_for("llama"), seed=seed) for seed in (1, 1, 2)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_dropout_gradients_are_those_of_the_numbers_drawn(tmp_path: Path) -> None:
    """The gradient equals differences of the streamed loss itself, along the gradient."""
    save_adapted("llama", tmp_path, lora_dropout=0.5)
    streamed, batches = open_streamed(tmp_path), batches_for("llama")[:1]

    trained = {name: parameter for name, parameter in streamed.model.named_parameters() if ".lora_" in name}

    def loss_and_gradients() -> tuple[float, Gradients]:
        losses: list[float] = []

        def consume(index: int, output: Any) -> None:
            with torch.enable_grad():
                loss = some_loss(index, output).double()
            losses.append(float(loss))
            loss.backward()

        for parameter in trained.values():
            parameter.grad = None
        with Meter(CPU) as meter, GradientStream(streamed, CPU, meter, trained=1, seed=5) as stream:
            stream.run(batches, consume)
            stream.reverse()
        return losses[0], collected(streamed.model)

    _, gradients = loss_and_gradients()
    squared = sum(float(gradient.double().square().sum()) for gradient in gradients.values())
    step = 1e-3 / squared**0.5
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for name, gradient in gradients.items():
                trained[name].add_(gradient, alpha=sign * step)
        values.append(loss_and_gradients()[0])
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(squared, rel=0.02)


def test_spilled_inputs_give_the_same_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "SMALLEST_BYTES", 64)
    save_adapted("gemma3", tmp_path)
    expected = streamed_gradients(open_streamed(tmp_path), batches_for("gemma3"))
    tight = SpillPool(4096)
    found = streamed_gradients(open_streamed(tmp_path), batches_for("gemma3"), spill_pool=tight)
    assert tight.spilled_bytes > 0
    assert tight.held_bytes <= 4096
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_shared_inputs_are_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary angles and masks are inputs of every layer; depth must not multiply them."""
    monkeypatch.setattr(spill, "SMALLEST_BYTES", 64)
    held = []
    for depth in (2, 4):
        directory = tmp_path / str(depth)
        save_deep(depth, directory)
        streamed, room = open_streamed(directory), SpillPool(1 << 30)
        batches = batches_for("llama")
        with Meter(CPU) as meter, GradientStream(streamed, CPU, meter, trained=3, spill_pool=room) as stream:
            stream.run(batches, lambda index, output: None)
            held.append(room.held_bytes)
    hidden_bytes = sum(batch["input_ids"].numel() for batch in batches) * 32 * 4
    assert held[1] - held[0] == 2 * hidden_bytes


def save_deep(depth: int, directory: Path) -> None:
    from helpers.resident_gradients import with_lora

    resident = with_lora(tiny_llama(num_hidden_layers=depth))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resident.save_pretrained(directory / "adapter")
    resident.unload().save_pretrained(directory / "model")


def test_an_input_that_is_changed_in_place_is_refused_by_name(tmp_path: Path) -> None:
    save_adapted("llama", tmp_path)
    streamed = open_streamed(tmp_path)
    seen: list[torch.Tensor] = []

    @contextmanager
    def on_unit(unit: Unit) -> Iterator[Any]:
        def run(index: int, args: Any, kwargs: Any) -> Any:
            output = unit.forward(*args, **kwargs)
            if unit.name.endswith("layers.0") and not seen:
                seen.append(args[0].add_(1))
            return output

        yield run

    with pytest.raises(BatchError, match=r"layers\.0.*changed in place"):
        streamed_gradients(streamed, batches_for("llama"), on_unit=on_unit)


def test_batches_that_are_only_scored_leave_no_gradients(tmp_path: Path) -> None:
    save_adapted("llama", tmp_path, lora_dropout=0.5)
    streamed, batches = open_streamed(tmp_path), batches_for("llama")
    outputs: dict[int, torch.Tensor] = {}

    def consume(index: int, output: Any) -> None:
        if index:
            outputs[index] = output.logits.materialize()
            assert not outputs[index].requires_grad
        else:
            with torch.enable_grad():
                some_loss(index, output).backward()

    with Meter(CPU) as meter, GradientStream(streamed, CPU, meter, trained=1) as stream:
        stream.run(batches, consume)
        stream.reverse()
    alone = streamed_gradients(open_streamed(tmp_path), batches[:1])
    assert all(torch.equal(gradient, alone[name]) for name, gradient in collected(streamed.model).items())
    resident = load(type(streamed.model).from_pretrained(tmp_path / "model"), tmp_path / "adapter").eval()
    for index, logits in outputs.items():
        assert torch.equal(logits, resident(**batches[index]).logits)


def test_compressed_inputs_take_less_and_keep_the_direction(tmp_path: Path) -> None:
    resident = save_adapted("llama", tmp_path)
    batches = [{"input_ids": torch.randint(3, VOCAB, (4, 32), generator=torch.Generator().manual_seed(3))}]
    expected = resident_gradients(resident, batches)
    cosines, held = [], []
    for rank in (None, 24, 0.25):
        room = SpillPool(1 << 30)
        streamed = open_streamed(tmp_path)
        with Meter(CPU) as meter, GradientStream(streamed, CPU, meter, trained=1, rank=rank, spill_pool=room) as stream:
            stream.run(batches, lambda index, output: some_loss_with_gradient(index, output))
            held.append(sum(tensor.nbytes for _, _, records in stream._records for tensor in records[0].kept.tensors))
            stream.reverse()
        found = collected(streamed.model)
        first, second = (torch.cat([part[name].flatten() for name in sorted(expected)]) for part in (found, expected))
        cosines.append(float(torch.nn.functional.cosine_similarity(first, second, dim=0)))
    assert cosines[0] == pytest.approx(1, abs=1e-6)
    assert cosines[0] > cosines[1] > cosines[2] > 0.3
    assert held[0] > held[1] > held[2]


def some_loss_with_gradient(index: int, output: Any) -> None:
    with torch.enable_grad():
        some_loss(index, output).backward()
