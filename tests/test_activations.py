"""Compressed activations against torch's own checkpointing and plain backward, on every kind of layer."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from gradients import adapted, batch_for, checkpointing, distance, equal, gradients, with_lora
from onelayer.compiler.errors import InputError
from onelayer.runtime import ActivationCompression, compress_activations
from tiny import HIDDEN, tiny_llama

NAMES = ["llama", "qwen3", "gemma3", "mixtral", "gpt2", "bert", "t5", "vit"]
WHOLE_LAYERS = {"bert", "opt"}  # built so that norms do not feed sub-blocks


@pytest.mark.parametrize("name", NAMES)
def test_exact_inputs_give_torchs_checkpoint_bit_for_bit(name: str) -> None:
    model = adapted(name)
    batch = batch_for(model)
    with checkpointing(model):
        expected = gradients(model, batch)
    compression = compress_activations(model, rank=HIDDEN, where="layer")
    assert equal(gradients(model, batch), expected)
    compression.rank = None
    assert equal(gradients(model, batch), expected)


@pytest.mark.parametrize("name", [*NAMES, "phi3", "gpt_neox", "gemma2", "qwen3_moe", "opt"])
def test_full_rank_in_sub_layers_is_exact_to_rounding(name: str) -> None:
    model = adapted(name)
    batch = batch_for(model)
    plain = gradients(model, batch)
    compression = compress_activations(model, rank=HIDDEN)
    assert distance(plain, gradients(model, batch)) < 3e-6
    assert bool(compression.fallbacks) is (name in WHOLE_LAYERS)
    assert bool(compression.norms) is (name not in WHOLE_LAYERS)


@pytest.mark.parametrize("where", ["layer", "sublayer"])
@pytest.mark.parametrize("name", NAMES)
def test_the_forward_pass_is_exact_and_gradients_are_near(name: str, where: Any) -> None:
    model = adapted(name)
    batch = batch_for(model)
    with checkpointing(model):  # which switches caches off, and so changes the last bits of T5
        expected = model(**batch).loss
    plain = gradients(model, batch)
    compress_activations(model, rank=8, where=where)
    assert torch.equal(model(**batch).loss, expected)
    found = gradients(model, batch)
    assert 0.01 < distance(plain, found) < 5  # the weights are random, and their activations hardly of low rank
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


def test_a_layer_whose_input_is_of_low_rank_has_a_good_gradient() -> None:
    model = adapted("llama")
    # Few different tokens and no positions: the states have as many directions as there are tokens.
    ids = torch.tensor([[3, 4, 5, 6] * 8])
    model.get_base_model().model.rotary_emb.inv_freq.zero_()
    batch = {"input_ids": ids, "labels": ids}
    plain = gradients(model, batch)
    for where in ("layer", "sublayer"):
        compression = compress_activations(model, rank=20, where=where)
        assert distance(plain, gradients(model, batch)) < 0.15
        compression.remove()


def test_dropout_is_the_same_with_and_without() -> None:
    config = {"attention_dropout": 0.2}
    model = with_lora(tiny_llama(**config), lora_dropout=0.3)
    batch = batch_for(model)
    plain = gradients(model, batch)
    assert distance(plain, gradients(model, batch, seed=8)) > 0.01
    for where in ("layer", "sublayer"):
        compression = compress_activations(model, rank=HIDDEN, where=where)
        assert distance(plain, gradients(model, batch)) < 3e-6
        compression.remove()


@pytest.mark.parametrize("where", ["layer", "sublayer"])
def test_autocast_and_bf16(where: Any) -> None:
    model = adapted("llama")
    batch = batch_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(model, batch)
        compress_activations(model, rank=HIDDEN, where=where)
        assert distance(plain, gradients(model, batch)) < 0.02
    short = adapted("gemma3").to(torch.bfloat16)
    plain = gradients(short, batch)
    compression = compress_activations(short, rank=HIDDEN, where=where)
    assert distance(plain, gradients(short, batch)) < 0.05
    compression.rank = 8
    assert all(torch.isfinite(tensor).all() for tensor in gradients(short, batch).values())
    assert not compression.fallbacks


@pytest.mark.parametrize("where", ["layer", "sublayer"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
def test_tokens_go_to_the_same_experts_when_they_are_recomputed(name: str, where: Any, experts: str) -> None:
    model = adapted(name)
    model.get_base_model().set_experts_implementation(experts)
    seen: list[list[torch.Tensor]] = []
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            calls: list[torch.Tensor] = []
            seen.append(calls)
            module.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[1].clone()))
    assert len(seen) == 2
    compress_activations(model, rank=4, where=where)
    gradients(model, batch_for(model))
    for calls in seen:
        first, *_, again = calls  # sub-layers are looked at in one more run
        assert torch.equal(first, again)
    assert len(seen[1]) == 2


def test_routing_is_replayed_with_gradients_through_the_chosen_experts() -> None:
    model = adapted("mixtral")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    batch = batch_for(model)
    plain = gradients(model, batch)
    compress_activations(model, rank=HIDDEN)
    found = gradients(model, batch)
    assert any("gate" in name for name in found)
    assert distance(plain, found) < 3e-6


def test_norms_that_are_trained_get_their_gradients() -> None:
    for name in ("llama", "gemma3", "gpt2"):
        model = adapted(name)
        for key, parameter in model.named_parameters():
            if "norm" in key or "ln_" in key:
                parameter.requires_grad_(True)
        batch = batch_for(model)
        plain = gradients(model, batch)
        assert len(plain) > 20
        compress_activations(model, rank=HIDDEN)
        assert distance(plain, gradients(model, batch)) < 3e-6


def test_padding_changes_nothing_for_the_other_tokens() -> None:
    model = adapted("llama")
    batch = batch_for(model)
    compression = compress_activations(model, rank=6)
    with compression.measure() as figures:
        found = gradients(model, batch)
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 99)}
    assert equal(gradients(model, other), found)
    rank, tokens = 6, 21
    assert figures.saved_bytes["norm outputs"] == 4 * (rank * (tokens + 2 * HIDDEN + 4) + 2 * tokens)


def test_an_encoders_padding_is_not_the_decoders() -> None:
    model = adapted("t5")
    batch = batch_for(model)
    compression = compress_activations(model, rank=8, where="layer")
    with compression.measure() as figures:
        gradients(model, batch)
    rows = {"encoder.block.0": 21, "decoder.block.0": 24}
    sizes = {name: 8 * (count + 2 * HIDDEN + 4) + 2 * count for name, count in rows.items()}
    # Two layers of each, and what the encoder passes to both decoder layers, compressed once.
    expected = 2 * sum(sizes.values()) + sizes["decoder.block.0"]
    assert figures.saved_bytes["layer inputs"] == expected


def test_layers_without_anything_to_train_keep_nothing() -> None:
    model = with_lora(tiny_llama(num_hidden_layers=3), target_modules=["q_proj", "down_proj"], layers_to_transform=[2])
    compression = compress_activations(model, rank=8)
    with compression.measure() as figures:
        gradients(model, batch_for(model))
    assert {name.split(".")[2] for name in figures.errors} == {"2"}


def test_figures_of_a_forward_pass() -> None:
    model = adapted("llama")
    batch = batch_for(model, padded=False)
    compression = compress_activations(model, rank=0.25)
    with compression.measure() as figures:
        gradients(model, batch)
    assert figures.saved_bytes["inverse norms"] == 3 * 24 * 4  # nothing below the first norm is trained
    assert figures.saved_bytes["norm outputs"] == 4 * (8 * (24 + 2 * HIDDEN + 4) + 2 * 24)
    assert "routing" not in figures.saved_bytes or figures.saved_bytes["routing"] == 0
    assert figures.total_bytes == sum(figures.saved_bytes.values())
    assert len(figures.errors) == 4
    assert all(0.1 < error < 0.9 for errors in figures.errors.values() for error in errors)
    assert all(ranks == [8] for ranks in figures.ranks.values())


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


def test_the_fallback_is_said_once_and_names_layer_and_reason(caplog: pytest.LogCaptureFixture) -> None:
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
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compress_activations(tiny_llama(), **settings)


def test_refused_models() -> None:
    with pytest.raises(InputError, match="no transformers model"):
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
