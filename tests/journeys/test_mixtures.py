"""Mixtures through whole runs: a killed compile, recomputed layers, the memory contract, and printed remarks."""

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.children import fork_server
from helpers.hashes import hashes
from helpers.mixtures import compiled, modules_of_experts, save_mixture, with_products
from helpers.resident_gradients import batch_for, distance, gradients, with_lora
from helpers.tiny_models import HIDDEN, causal, tiny_tokenizer
from onelayer.compiler.compile.command import compile_emulator
from onelayer.runtime import compress_activations, load_emulator
from onelayer.runtime.reporting.summaries import compile_summary, inspect_summary


def child(root: Path, name: str, home: str) -> None:
    os.environ["ONELAYER_HOME"] = home
    torch.set_num_threads(1)
    compiled(root, name)


def test_kills_at_random_moments_give_the_same_bytes(tmp_path: Path, own_store: Path) -> None:
    save_mixture("qwen3_moe", tmp_path)
    context = fork_server()

    def start(name: str) -> Any:
        process = context.Process(target=child, args=(tmp_path, name, str(own_store)))
        process.start()
        return process

    start("warm").join()
    begun = time.perf_counter()
    start("calm").join()
    calm_seconds = time.perf_counter() - begun
    moments, kills = random.Random(2), 0
    while kills < 4:
        process = start("stormy")
        time.sleep(moments.uniform(0.3, 1.0) * calm_seconds)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if (tmp_path / "stormy").exists():
            assert hashes(tmp_path / "stormy") == hashes(tmp_path / "calm")
            shutil.rmtree(tmp_path / "stormy")
    start("stormy").join()
    assert hashes(tmp_path / "stormy") == hashes(tmp_path / "calm")


def test_finished_units_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onelayer.compiler.compile import job

    save_mixture("mixtral", tmp_path)
    compiled(tmp_path, "calm")
    done: list[str] = []
    real = job.Compilation._stacks

    def counted(self: Any, calls: Any) -> Any:
        done.append(calls.stacks.name)
        if len(done) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, calls)

    monkeypatch.setattr(job.Compilation, "_stacks", counted)
    with pytest.raises(OSError, match="No space left"):
        compiled(tmp_path)
    compiled(tmp_path)
    assert done == [f"model.layers.{layer}.mlp.experts" for layer in (0, 1, 1)]
    assert hashes(tmp_path / "emulator") == hashes(tmp_path / "calm")


@pytest.mark.parametrize("where", ["layer", "sublayer"])
@pytest.mark.parametrize(("name", "kind"), [("mixtral", None), ("qwen3_moe", None), ("qwen3_moe", "nf4")])
def test_tokens_go_to_the_same_low_rank_experts_when_recomputed(
    name: str, where: Any, kind: Any, tmp_path: Path
) -> None:
    save_mixture(name, tmp_path)
    compiled(tmp_path, factor_dtype=kind)
    model = with_lora(load_emulator(tmp_path / "emulator"))
    batch = batch_for(model)
    plain = gradients(model, batch)
    seen: list[list[torch.Tensor]] = []
    for module in modules_of_experts(model).values():
        calls: list[torch.Tensor] = []
        seen.append(calls)
        module.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[1].clone()))
    assert len(seen) == 2
    compression = compress_activations(model, rank=4, where=where)
    gradients(model, batch)
    for first, *_, again in seen:
        assert torch.equal(first, again)
    compression.rank = HIDDEN
    assert distance(plain, gradients(model, batch)) < 3e-6


def test_gradients_pass_through_low_rank_experts(tmp_path: Path) -> None:
    """Compare with the same model with dense stacks, run by transformers' own functions."""
    for name in ("gpt_oss", "deepseek_v3"):
        root = tmp_path / name
        root.mkdir()
        original = save_mixture(name, root)
        compiled(root)
        dense = with_products(original, root / "emulator")
        batch = batch_for(dense)
        low_rank = with_lora(load_emulator(root / "emulator"), target_modules=["o_proj"])
        wanted = gradients(with_lora(dense, target_modules=["o_proj"]), batch)
        assert distance(wanted, gradients(low_rank, batch)) < 1e-4


def test_frozen_factors_keep_no_inputs_for_the_backward_pass(tmp_path: Path) -> None:
    from onelayer.runtime.activations.figures import SavedBytes

    save_mixture("mixtral", tmp_path)
    compiled(tmp_path)
    module: Any = load_emulator(tmp_path / "emulator").get_submodule("model.layers.0.mlp.experts")
    tokens, per_token, inner = 32, 2, 64
    x = torch.randn(tokens, HIDDEN, requires_grad=True)
    index = torch.arange(tokens * per_token).reshape(tokens, per_token) % 4
    weights = torch.full((tokens, per_token), 0.5, requires_grad=True)
    with SavedBytes(module) as saved:
        module(x, index, weights)
    rows = tokens * per_token
    # The gate's two halves and its activation, the outputs before weighting, the weights, and the order of rows.
    assert saved.total() <= 4 * rows * (3 * inner + HIDDEN) + 64 * rows


def test_compile_and_inspect_report_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_mixture("mixtral", tmp_path)
    result = compiled(tmp_path)
    text = compile_summary(result.model_dump(mode="json"))
    assert "16 expert matrices in 4 stacks" in text
    assert "stay dense" not in text
    document = {"kind": "emulator", **json.loads((tmp_path / "emulator" / "emulator.json").read_text())}
    assert "model.layers.1.mlp.experts.down_proj" in inspect_summary(document)
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    monkeypatch.setattr(MixtralExperts, "forward", lambda self, x, index, weights: x)
    text = compile_summary(compiled(tmp_path, "other").model_dump(mode="json"))
    assert "49,152 expert parameters stay dense: their class does not support transformers' experts interface" in text


def compile_in_child(root: Path, samples: int, home: str) -> None:
    os.environ["ONELAYER_HOME"] = home
    torch.set_num_threads(1)
    result = compile_emulator(
        root / "model",
        root / "long.jsonl",
        root / f"emulator{samples}",
        samples=samples,
        host_memory_bytes=0,
        ratio=0.2,
    )
    (root / f"report{samples}.json").write_text(result.report.model_dump_json())


def test_a_mixture_stays_within_the_prediction_whatever_the_samples(tmp_path: Path, own_store: Path) -> None:
    shape = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
    experts = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 192}
    causal("Qwen3Moe", max_position_embeddings=512, **shape, **experts).save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    words = "the quick brown fox jumps over the lazy dog " * 200
    (tmp_path / "long.jsonl").write_text((json.dumps({"text": words}) + "\n") * 16)
    context = fork_server()
    for samples in (2, 16):
        process = context.Process(target=compile_in_child, args=(tmp_path, samples, str(own_store)))
        process.start()
        process.join()
        report = json.loads((tmp_path / f"report{samples}.json").read_text())
        assert report["peak_device_bytes"] <= report["largest_unit_bytes"] + report["workspace_bytes"]
