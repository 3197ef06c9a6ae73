"""A streamed model against the resident one: the same losses, gradients and texts, each layer read twice a step."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from helpers.tiny_models import VOCAB, save_tiny
from onelayer.compiler.adapters.attach import linear_targets
from onelayer.compiler.errors import InputError
from onelayer.runtime import streamed_for_training

# What a launcher of two processes gives each of them.
LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
Gradients = dict[str, torch.Tensor]


def resident_model(directory: Path) -> Any:
    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(directory)


def opened(directory: Path, **settings: Any) -> Any:
    return streamed_for_training(directory, **{"device": "cpu", **settings})


def adapted(model: Any, **fields: Any) -> Any:
    """The model with LoRA of random factors on its linears, in training mode."""
    transposed = any(isinstance(module, transformers.pytorch_utils.Conv1D) for module in model.modules())
    targets = linear_targets(model, "all-linear")
    lora = {"r": 2, "target_modules": targets, "init_lora_weights": False, "fan_in_fan_out": transposed, **fields}
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**lora)).train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (5, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def step(model: Any) -> tuple[torch.Tensor, Gradients]:
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in trained.items()}


@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "gpt2", "bert", "t5"])
def test_losses_gradients_and_texts_are_the_resident_models(name: str, tmp_path: Path) -> None:
    # In float64, what micro-batches round otherwise hides no mistake; experts have no product in it.
    dtype, error = (torch.float32, 2e-5) if name == "mixtral" else (torch.float64, 1e-6)
    save_tiny(name, tmp_path, dtype)
    resident = adapted(resident_model(tmp_path))
    streamed = adapted(opened(tmp_path, micro_batch_size=2))
    assert type(streamed.get_base_model()).__name__ == type(resident.get_base_model()).__name__
    (expected_loss, expected), (loss, found) = step(resident), step(streamed)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=error * float(gradient.abs().max()), msg=key)
    if name != "bert":
        texts = [
            model.eval().generate(input_ids=batch()["input_ids"][:2], max_new_tokens=4, do_sample=False)
            for model in (resident, streamed)
        ]
        assert torch.equal(*texts)


def test_a_loss_under_autocast_is_in_float32_whatever_the_logits_are(tmp_path: Path) -> None:
    save_tiny("t5", tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    resident = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    # With gradients torch's own kernels round this model's states otherwise than without, so neither has them here.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = resident(input_ids=ids, labels=ids)
        loss = streamed_for_training(tmp_path).eval()(input_ids=ids, labels=ids).loss
    assert (expected.logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(loss, expected.loss)


def test_a_step_reads_all_but_the_last_layers_that_fit_the_cache_twice(tmp_path: Path) -> None:
    save_tiny("mistral", tmp_path)
    first = opened(tmp_path).streaming.streamed
    sizes = [first.weights.stored_bytes(unit.held_names) for unit in first.units]
    cache_bytes = sizes[-1] + sizes[-2]  # the norm and the last layer
    read, gradients = {}, {}
    for cached in (0, cache_bytes):
        model = adapted(opened(tmp_path, cache_bytes=cached))
        step(model)
        checkpoint = model.streaming.streamed.checkpoint
        before = checkpoint.bytes_read
        _, gradients[cached] = step(model)
        read[cached] = checkpoint.bytes_read - before
    # Each pass begins with the unit that the pass before ended with; the head is one slice, read once.
    turns, head_bytes = sizes[-1] + sizes[0], 4 * VOCAB * first.config.hidden_size
    assert read[0] == 2 * sum(sizes) - turns + head_bytes
    assert read[0] - read[cache_bytes] == 2 * cache_bytes - sizes[-1]
    assert all(torch.equal(gradients[0][name], gradients[cache_bytes][name]) for name in gradients[0])


def test_dropout_is_the_same_on_the_way_back_and_another_in_the_next_call(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = adapted(opened(tmp_path, micro_batch_size=2), lora_dropout=0.5)
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses += [step(model), step(model)]
    assert losses[0][0] == losses[2][0] != losses[1][0] == losses[3][0]
    assert all(torch.equal(losses[0][1][name], losses[2][1][name]) for name in losses[0][1])
    # A small move along the gradient changes the loss, with the same dropout, as the gradient says.
    square = sum(float(gradient.square().sum()) for gradient in losses[0][1].values())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in losses[0][1]:
                parameter -= 1e-3 / square * losses[0][1][name]
    torch.manual_seed(3)
    assert float(losses[0][0] - step(model)[0]) == pytest.approx(1e-3, rel=0.05)


def test_calls_that_draw_nothing_leave_the_generator_alone(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = adapted(opened(tmp_path))
    before = torch.get_rng_state()
    step(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_streamed_model_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    model = opened(tmp_path / "model")
    with pytest.raises(InputError, match=r"nothing is trained; attach an adapter"):
        model.train()(**batch())
    with pytest.raises(InputError, match=r"out: the weights .* are those of .*model; save the adapter"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(InputError, match=r"weights of a streamed original do not change"):
        model.requires_grad_(True)
    with_adapter = adapted(model)
    with pytest.raises(TypeError, match="needs the values of a weight outside its unit"):
        with_adapter.merge_and_unload()
    loss = with_adapter(**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"keeps nothing after backward\(\); call the model again"):
        loss.backward()
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--micro-batch-size 0: must be at least 1"):
        opened(tmp_path, micro_batch_size=0)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"model: a streamed model trains in one process; start it without torchrun"):
        opened(tmp_path / "model")
