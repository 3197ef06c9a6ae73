"""The faults of the published implementation of LoRAct, one by one: none may happen here.

The numbers are those of the project's list of faults.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.resident_gradients import adapted, batch_for, checkpointing, distance, equal, gradients, with_lora
from helpers.tiny_models import HIDDEN, tiny_llama
from onelayer.compiler.factors.activation_factors import ExactTensor, compress
from onelayer.runtime import compress_activations


def test_1_dtypes_of_newer_torch_versions_do_no_harm() -> None:
    """It read the machine epsilon of every float dtype at import; 4-bit floats have none."""
    assert hasattr(torch, "float4_e2m1fn_x2"), "and `compression` is imported above"
    eighth = torch.ones(64, 64).to(torch.float8_e4m3fn)
    assert isinstance(compress(eighth, 4, torch.Generator()), ExactTensor)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_3_norms_that_scale_by_one_plus_the_weight(name: str) -> None:
    """It scaled by the weight alone, so the forward pass was wrong."""
    model = adapted(name)
    batch = batch_for(model)
    with torch.no_grad():
        expected = model(**batch).logits
    plain = gradients(model, batch)
    compression = compress_activations(model, rank=HIDDEN)
    assert torch.equal(model(**batch).logits, expected)
    assert distance(plain, gradients(model, batch)) < 3e-6
    assert len(compression.norms) == 8


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("weight", [0.0, 1e-30])
def test_5_norm_weights_of_zero(name: str, weight: float) -> None:
    """It divided by the norm's weight, which gave infinities or amplified errors."""
    model = adapted(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ("norm" in key or "ln_" in key) and key.endswith("weight"):
                parameter[::3] = weight
    batch = batch_for(model)
    plain = gradients(model, batch)
    compression = compress_activations(model, rank=HIDDEN)
    assert distance(plain, gradients(model, batch)) < 3e-6
    assert not compression.fallbacks
    compression.rank = 6
    assert distance(plain, gradients(model, batch)) < 3


@pytest.mark.parametrize("where", ["layer", "sublayer"])
def test_6_the_global_random_state_is_left_alone(where: Any) -> None:
    """It drew from the global generator, so compression changed dropout and data order."""
    model = with_lora(tiny_llama(), lora_dropout=0.3)
    batch = batch_for(model)

    def state_after() -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model(**batch).loss.backward()
            return torch.get_rng_state()

    plain = state_after()
    compression = compress_activations(model, rank=8, where=where, seed=3)
    assert torch.equal(state_after(), plain)
    first = gradients(model, batch)
    assert equal(gradients(model, batch), first)
    compression.remove()
    compress_activations(model, rank=8, where=where, seed=4)
    assert not equal(gradients(model, batch), first)


def test_7_factors_are_never_larger_than_the_tensor() -> None:
    """It stored 69,632 numbers for 65,536."""
    model = adapted("llama")
    batch = {name: tensor[:, :4] for name, tensor in batch_for(model, padded=False).items()}
    plain = gradients(model, batch)
    compression = compress_activations(model, rank=8)
    with compression.measure() as figures:
        found = gradients(model, batch)
    assert figures.saved_bytes["norm outputs"] == 4 * 8 * HIDDEN * 4
    assert distance(plain, found) < 3e-6


def test_8_nothing_is_kept_for_frozen_linears() -> None:
    """It kept the inputs of frozen linears, whose backward pass needs none."""
    model = adapted("llama")
    batch = batch_for(model, padded=False)
    compression = compress_activations(model, rank=4)
    gradients(model, batch)  # the first pass examines the layers
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    base = model.get_base_model().model
    resident = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    with compression.measure() as figures, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        base.layers[0](
            torch.randn(1, 24, HIDDEN, requires_grad=True),
            position_embeddings=base.rotary_emb(torch.zeros(1), torch.arange(24)[None]),
        )
    kept = [tensor for tensor in saved if tensor.numel() and tensor.data_ptr() not in resident]
    assert not kept
    assert set(figures.saved_bytes) <= {"norm outputs", "inverse norms", "shared inputs", "routing"}


def test_10_errors_surface_where_they_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers printed their errors and continued; the backward pass then failed for another reason."""
    model = adapted("llama")
    batch = batch_for(model)
    compress_activations(model, rank=4)

    def failing(*args: Any) -> None:
        raise MemoryError("no room for factors")

    with monkeypatch.context() as patched:
        patched.setattr("onelayer.runtime.activations.stored_copies.compress", failing)
        with pytest.raises(MemoryError, match="no room for factors"):
            model(**batch)
    assert all(torch.isfinite(tensor).all() for tensor in gradients(model, batch).values())
    with torch.no_grad():
        model.get_input_embeddings().weight[batch["input_ids"][0, 0]] = float("nan")
    assert not all(torch.isfinite(tensor).all() for tensor in gradients(model, batch).values())


@pytest.mark.parametrize("where", ["layer", "sublayer"])
def test_13_checkpointing_switched_on_in_addition_does_not_stack(
    where: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """It only warned, and both mechanisms ran. It also could not be used without its own trainer."""
    model = adapted("llama")
    batch = batch_for(model)
    compression = compress_activations(model, rank=6, where=where)
    alone = gradients(model, batch)
    calls: list[int] = []
    layer = model.get_base_model().model.layers[0]
    layer.mlp.down_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(model, batch)
    runs = len(calls)
    base = model.get_base_model()
    for _ in range(2):
        base.activation_checkpointing_enable()
        base.disable_input_require_grads()
        assert equal(gradients(model, batch), alone)
    assert len(calls) == 3 * runs
    assert len([record for record in caplog.records if "takes the place" in record.message]) == 1
    base.activation_checkpointing_disable()
    assert not base.is_activation_checkpointing
    compression.remove()
    plain = gradients(model, batch)
    with checkpointing(model):
        assert equal(gradients(model, batch), plain)


@pytest.mark.parametrize("where", ["layer", "sublayer"])
def test_14_every_argument_and_every_backward(where: Any) -> None:
    """It compressed only the first argument, changed lists in the backward pass, and required plain bound methods."""
    model = adapted("t5")
    batch = batch_for(model)
    compression = compress_activations(model, rank=6, where=where)
    gradients(model, batch)
    with compression.measure() as figures:
        loss = model(**batch).loss
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    one = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
    two = torch.autograd.grad(loss, trained, allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True) if a is not None and b is not None)
    kept = {rank for ranks in figures.ranks.values() for rank in ranks}
    assert kept == {6}
    # Models that call layers as `checkpoint(module.__call__, hidden)` pass bound methods and closures.
    layer = torch.nn.Linear(HIDDEN, HIDDEN)
    hidden = torch.randn(2, 12, HIDDEN, requires_grad=True)
    compression.rank = None
    for call in (layer.__call__, lambda tensor: layer(tensor)):
        torch.testing.assert_close(
            torch.autograd.grad(compression._engine.run(call, hidden).sum(), hidden)[0],
            torch.autograd.grad(layer(hidden).sum(), hidden)[0],
        )
