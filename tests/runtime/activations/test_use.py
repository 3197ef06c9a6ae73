"""Compressed activations in use: evaluation, removal, accumulation, several processes, and refusals."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from helpers.resident_gradients import adapted, batch_for, distance, equal, gradients
from helpers.tiny_models import HIDDEN, tiny_llama
from onelayer.compiler.errors import InputError
from onelayer.runtime import ActivationCompression, compress_activations


def test_evaluation_and_generation_are_untouched() -> None:
    model = adapted("llama")
    batch = batch_for(model)
    model.eval()
    expected = model(**batch).logits
    written = model.generate(batch["input_ids"][:1], max_new_tokens=4, do_sample=False)
    compression = compress_activations(model, rank=4)
    gradients(model.train(), batch)
    model.eval()
    assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(model.generate(batch["input_ids"][:1], max_new_tokens=4, do_sample=False), written)
    with torch.no_grad():
        assert torch.equal(model.train()(**batch).loss, model(**batch).loss)
    with compression.measure() as figures, torch.no_grad():
        model(**batch)
    assert not figures.total_bytes


def test_removing_it_gives_the_model_back() -> None:
    model = adapted("gemma3")
    batch = batch_for(model)
    before = {id(module): dict(vars(module)) for module in model.modules()}
    plain = gradients(model, batch)
    compression = compress_activations(model, rank=4)
    gradients(model, batch)
    compression.remove()
    assert equal(gradients(model, batch), plain)
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert set(before) == {id(module) for module in model.modules()}
    copy.deepcopy(model)


def test_recorded_outputs_are_recorded_once() -> None:
    model = adapted("mixtral")
    batch = batch_for(model)
    plain = model(**batch, output_router_logits=True, output_hidden_states=True)
    compress_activations(model, rank=8)
    found = model(**batch, output_router_logits=True, output_hidden_states=True)
    assert len(found.router_logits) == len(plain.router_logits) == 2
    assert len(found.hidden_states) == len(plain.hidden_states)
    assert torch.equal(found.loss, plain.loss)
    (found.loss + found.aux_loss).backward()


def test_the_fallback_is_reported_once_with_layer_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted("bert")
    compression = compress_activations(model, rank=8)
    with caplog.at_level(logging.WARNING, logger="onelayer"):
        for _ in range(2):
            gradients(model, batch_for(model))
    assert list(compression.fallbacks) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert len(caplog.records) == 1
    assert "bert.encoder.layer.0" in caplog.text
    assert "bytes in a call would be kept" in caplog.text


def test_accumulated_gradients_add_up() -> None:
    model = adapted("llama")
    batch = batch_for(model)
    compress_activations(model, rank=8)
    one = gradients(model, batch)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, 2 * one[name])


def test_several_forward_passes_before_their_backward() -> None:
    model = adapted("llama")
    batches = [batch_for(model), batch_for(model, padded=False)]
    compress_activations(model, rank=8)
    apart = [gradients(model, batch) for batch in batches]
    model.zero_grad()
    losses = [model(**batch).loss for batch in batches]
    torch.stack(losses).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, apart[0][name] + apart[1][name])


def test_distributed_data_parallel(tmp_path: Any) -> None:
    model = adapted("llama")
    batch = batch_for(model)
    compress_activations(model, rank=8)
    alone = gradients(model, batch)
    address = f"file://{tmp_path}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        parallel: Callable[..., Any] = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            parallel(**batch).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert equal(found, alone)
        # Whoever drops the group last waits for its threads. A model that does holds the interpreter's lock, which they
        # may be waiting for.
        del parallel
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank: 0"),
        ({"rank": 1.0}, "rank: 1.0"),
        ({"rank": True}, "rank: True"),
        ({"rank": float("nan")}, "rank: nan"),
        ({"where": "none"}, "where: 'none'"),
        ({"residual_bits": 3}, "residual_bits: 3"),
        ({"residual_bits": True}, "residual_bits: True"),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compress_activations(tiny_llama(), **settings)


def test_refused_models() -> None:
    with pytest.raises(InputError, match="Linear is no model of transformers or diffusers"):
        compress_activations(torch.nn.Linear(2, 2))
    model = tiny_llama()
    first = compress_activations(model)
    assert isinstance(first, ActivationCompression)
    with pytest.raises(InputError, match="compressed already"):
        compress_activations(model)
    first.remove()
    compress_activations(model)


def test_a_model_without_recomputable_layers_is_refused() -> None:
    class Bare(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(InputError, match="no layers that can be recomputed"):
        compress_activations(Bare(transformers.LlamaConfig()))


def test_a_norm_output_that_is_changed_in_place_is_not_taken_from_its_copy() -> None:
    def enlarge(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        kwargs["hidden_states"].mul_(1.5)

    model = adapted("llama")
    batch = batch_for(model)
    for layer in model.get_base_model().model.layers:
        layer.self_attn.register_forward_pre_hook(enlarge, with_kwargs=True)
    plain = gradients(model, batch)
    compression = compress_activations(model, rank=HIDDEN)
    assert distance(plain, gradients(model, batch)) < 3e-6
    assert not compression.fallbacks


def test_an_input_changed_in_place_before_recomputation_is_an_error() -> None:
    model = adapted("llama")
    batch = batch_for(model, padded=False)
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().clone()
    compress_activations(model, rank=HIDDEN, where="layer")
    loss = model(inputs_embeds=embedded, labels=batch["labels"]).loss
    embedded.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
