"""The memory contract, measured in fresh processes: batches, long samples and prompts, and mixtures stay within it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.promised_runs import anchored, check_promise, compiled, measured, polished, refined
from helpers.tiny_models import build, causal, tiny_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog "
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
# One reads long prompts and answers briefly; the other sends its tokens to half of its wide experts.
READER = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 2, "num_heads": 4}
MIXTURE = {"hidden_size": 128, "intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 4}


def prepare(root: Path, model: Any, rows: list[dict[str, str]]) -> None:
    model.save_pretrained(root / "model")
    tiny_tokenizer(root / "model")
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_of_many_lengths_in_half_precision_stay_within_the_prediction(tmp_path: Path, own_store: Path) -> None:
    """Every length has kernels of its own, which a CPU keeps: 500 MiB of 70 before their number was limited."""
    prepare(
        tmp_path,
        causal("Llama", hidden_size=128, intermediate_size=256).to(torch.bfloat16),
        [{"text": " ".join(WORDS.split()[: 1 + number % 9] * (1 + number // 9))} for number in range(40)],
    )
    for command, settings in ((compiled, {"batch_size": 4}), (refined, {"batch_size": 4})):
        report = measured(command, tmp_path, own_store, **settings)
        check_promise(report)
        assert report.workspace_bytes < 220 << 20


@pytest.mark.parametrize(("batch_size", "max_length"), [(16, 64), (1, 1024)])
def test_large_batches_and_long_samples_stay_within_the_prediction(
    batch_size: int, max_length: int, tmp_path: Path, own_store: Path
) -> None:
    model = causal("Llama", num_hidden_layers=2, max_position_embeddings=1024, **WIDE)
    prepare(tmp_path, model, [{"text": WORDS * 200}] * 16)
    check_promise(measured(compiled, tmp_path, own_store, batch_size=batch_size, max_length=max_length))


def test_codes_stay_within_the_prediction_whatever_the_depth(tmp_path: Path, own_store: Path) -> None:
    """What waits for the way back lies in files: more layers, and more samples, hold no more."""
    settings = {"ratio": None, "keep_bytes": 0.2, "form": "coded", "host_memory_bytes": None, "max_length": 256}
    reports = []
    for layers, samples in ((2, 32), (4, 64)):
        root = tmp_path / f"of {layers}"
        root.mkdir()
        shape = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
        prepare(root, causal("Llama", num_hidden_layers=layers, **shape), [{"text": WORDS * 60}] * samples)
        reports.append(measured(compiled, root, own_store, **settings))
    kept_bytes = 32 * 256 * 256 * 4
    for report in reports:
        check_promise(report)
    grown = reports[1].peak_device_bytes - reports[0].peak_device_bytes
    assert grown < 5 * kept_bytes, (
        "before they lay in files, states of 32 more samples and 2 more layers took 6 to 8 times"
    )


def test_anchoring_stays_within_the_prediction_however_many_steps_wait(tmp_path: Path, own_store: Path) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    prepare(tmp_path, causal("Llama", num_hidden_layers=2, **shape), [{"text": WORDS * 60}])
    measured(compiled, tmp_path, own_store, max_length=128)
    rows, tokens = 8, 256
    reports = [measured(anchored, tmp_path, own_store, batches=each, rows=rows, tokens=tokens) for each in (1, 65)]
    for report in reports:
        check_promise(report)
    states_bytes = 64 * rows * tokens * shape["hidden_size"] * 4
    grown = reports[1].peak_device_bytes - reports[0].peak_device_bytes
    assert grown < states_bytes // 2, "hidden states of 64 more batches wait in files, not in memory"


def test_the_holes_that_steps_leave_stay_within_the_prediction(tmp_path: Path, own_store: Path) -> None:
    prepare(tmp_path, causal("Llama", num_hidden_layers=2, **WIDE), [{"text": WORDS * 100}] * 64)
    measured(compiled, tmp_path, own_store, max_length=128)
    reports = [measured(refined, tmp_path, own_store, batch_size=32, steps=4, max_length=128)]
    settings = {"batch_size": 64, "micro_batch_size": 32, "steps": 2, "max_length": 128}
    reports.append(measured(polished, tmp_path, own_store, **settings))
    for report in reports:
        assert report.peak_device_bytes > 256 << 20, "little is computed, so that nothing could be seen"
        check_promise(report)


def test_long_prompts_of_an_encoder_decoder_stay_within_the_prediction(tmp_path: Path, own_store: Path) -> None:
    tokens = {"vocab_size": 128, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    model = build("T5Config", "T5ForConditionalGeneration", dropout_rate=0.0, **READER, **tokens)
    prepare(tmp_path, model, [{"prompt": WORDS * 22, "completion": " fox"}] * 32)
    settings = {"batch_size": 32, "max_length": 512}
    reports = [measured(command, tmp_path, own_store, **settings) for command in (compiled, refined)]
    for report in reports:
        assert report.peak_device_bytes > 128 << 20, "little is computed, so that nothing could be seen"
        check_promise(report)


def test_routed_tokens_of_a_mixture_stay_within_the_prediction(tmp_path: Path, own_store: Path) -> None:
    prepare(tmp_path, causal("Mixtral", **MIXTURE), [{"text": WORDS * 100}] * 32)
    report = measured(polished, tmp_path, own_store, batch_size=32, micro_batch_size=32, max_length=128)
    check_promise(report)
    measured(compiled, tmp_path, own_store, max_length=128)
    report = measured(refined, tmp_path, own_store, batch_size=32, max_length=128)
    check_promise(report)
