"""Anchors against resident models: right after a renewal the emulator answers what the original answers."""

from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.anchored_models import Pair
from helpers.peft_adapters import quiet_peft
from helpers.resident_gradients import checkpointing, distance, gradients
from onelayer.runtime import compress_activations
from onelayer.runtime.anchors import adapter_sums

NAMES = ("llama", "gpt2", "classifier", "t5", "mixtral")


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda name: Pair(name, Path(tmp_path_factory.mktemp(name))))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", NAMES)
def test_exact_offsets_give_the_original_and_two_bits_come_near(pair_of: Any, name: str) -> None:
    pair = pair_of(name)
    wanted, plain = pair.logits(pair.original), pair.logits(pair.emulator)
    errors = {}
    for bits in (32, 2):
        with pair.anchors(bits) as anchors:
            anchors.renew([pair.batch])
            with anchors.next_batch():
                errors[bits] = relative(pair.logits(pair.emulator), wanted)
            assert anchors.is_used_up
        assert torch.equal(pair.logits(pair.emulator), plain)
    assert errors[32] < 2e-6
    assert 0.01 < errors[2] < 0.6 * relative(plain, wanted)


def test_states_of_many_batches_wait_in_files_where_the_host_computes(pair_of: Any, own_store: Path) -> None:
    pair = pair_of("llama")
    ids = torch.arange(4 * 128).reshape(4, 128) % 100
    with pair.anchors(2) as anchors:
        anchors.renew([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 3)
        state_bytes = ids.numel() * pair.original.config.hidden_size * 4
        assert anchors.report(every=3).spilled_bytes >= 3 * state_bytes


@pytest.mark.parametrize("name", NAMES)
def test_two_bits_lose_an_eighth_of_the_square_of_each_offset(pair_of: Any, name: str) -> None:
    pair = pair_of(name)
    found = {}
    for bits in (32, 2):
        with pair.anchors(bits) as anchors:
            anchors.renew([pair.batch])
            found[bits] = {unit: offsets[0].rebuild() for unit, offsets in anchors._waiting[0][0][1].items()}
    assert found[32].keys() == found[2].keys()
    assert len(found[32]) >= 2
    for unit, exact in found[32].items():
        assert relative(found[2][unit], exact) ** 2 < 0.17, unit


@pytest.mark.parametrize("recomputed", ["not", "by torch", "layer", "sublayer"])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_a_dense_reference(pair_of: Any, name: str, recomputed: str) -> None:
    pair = pair_of(name)
    with pair.anchors(32) as anchors:
        anchors.renew([pair.batch])
        with pair.dense_offsets(anchors._waiting[0][0][1]):
            wanted = gradients(pair.dense.train(), pair.batch)
        plain = gradients(pair.emulator.train(), pair.batch)
        with anchors.next_batch():
            if recomputed == "by torch":
                with checkpointing(pair.emulator):
                    found = gradients(pair.emulator, pair.batch)
            elif recomputed != "not":
                compression = compress_activations(pair.emulator, rank=0.5, where=recomputed)  # type: ignore[arg-type]
                with compression.exact() if recomputed == "layer" else nullcontext():
                    compression.rank = None
                    found = gradients(pair.emulator, pair.batch)
                compression.remove()
            else:
                found = gradients(pair.emulator, pair.batch)
    pair.emulator.eval(), pair.dense.eval()
    assert distance(found, wanted) < 1e-5
    assert distance(plain, wanted) > 0.05


def test_the_adapter_is_the_present_one_at_each_renewal(pair_of: Any) -> None:
    pair = pair_of("llama")
    with pair.anchors(32) as anchors:
        anchors.renew([pair.batch, pair.batch])
        with anchors.next_batch():
            before = pair.logits(pair.emulator)
        moved = {name: value for name, value in pair.emulator.named_parameters() if value.requires_grad}
        kept = {name: value.detach().clone() for name, value in moved.items()}
        with torch.no_grad():
            for value in moved.values():
                value.mul_(1.5)
        pair.original.load_state_dict(moved, strict=False)
        wanted = pair.logits(pair.original)
        with anchors.next_batch():
            assert relative(pair.logits(pair.emulator), wanted) > 1e-3
        anchors.renew([pair.batch])
        with anchors.next_batch():
            assert relative(pair.logits(pair.emulator), wanted) < 2e-6
        for model in (pair.original, pair.emulator):
            model.load_state_dict(kept, strict=False)
    assert not torch.equal(before, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_add_in_place_what_peft_adds(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Says what broke if PEFT adds in another way."""
    bare: Any = torch.nn.Sequential(torch.nn.Linear(24, 40)).to(dtype)
    model: Any = quiet_peft(bare, r=4, lora_alpha=8, target_modules=["0"], task_type=None)
    torch.nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    x = torch.randn(6, 24).to(dtype)
    real, calls = adapter_sums._InPlace.forward, list[str]()

    def noted(layer: Any, active_adapter: str, x: Any, result: Any, **further: Any) -> torch.Tensor:
        calls.append(active_adapter)
        before = result.data_ptr()
        found = real(layer, active_adapter, x, result, **further)
        assert found.data_ptr() == before
        return found

    monkeypatch.setattr(adapter_sums._InPlace, "forward", noted)
    with torch.no_grad():
        wanted = model(x)
        with adapter_sums.added_in_place(model):
            found = model(x)
        again = model(x)
    assert calls == ["default"]
    assert torch.equal(again, wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6)


def test_anchoring_draws_no_random_numbers_and_leaves_the_mode(pair_of: Any) -> None:
    pair = pair_of("llama")
    state = torch.get_rng_state()
    pair.emulator.train()
    with pair.anchors(2) as anchors:
        anchors.renew([pair.batch])
        assert pair.emulator.training
    pair.emulator.eval()
    assert torch.equal(torch.get_rng_state(), state)


def test_figures_say_what_it_took(pair_of: Any) -> None:
    pair = pair_of("llama")
    with pair.anchors(2) as anchors:
        anchors.renew([pair.batch] * 3)
        once = anchors.report(7)
        for _ in range(3):
            anchors.next_batch()
        anchors.renew([pair.batch])
        report = anchors.report(7)
    tokens, width, layers = 24, 32, 2
    assert (report.every, report.bits, report.renewals) == (7, 2, 2)
    assert report.offset_bytes == 3 * layers * (tokens * width // 4 + 2 * (tokens + width))
    assert report.bytes_read == 2 * once.bytes_read > 0
    assert report.seconds > once.seconds
    assert report.largest_unit_bytes > 0
