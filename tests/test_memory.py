"""The memory contract of a compile, measured in fresh processes: large batches and long samples stay inside it too."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from onelayer.compiler.compile import compile_emulator
from tiny import causal, tiny_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog "


def compile_in_child(root: Path, batch_size: int, max_length: int, home: str) -> None:
    os.environ["ONELAYER_HOME"] = home
    torch.set_num_threads(1)
    result = compile_emulator(
        root / "model",
        root / "long.jsonl",
        root / "emulator",
        batch_size=batch_size,
        max_length=max_length,
        host_memory_bytes=0,
        ratio=0.2,
    )
    (root / "report.json").write_text(result.report.model_dump_json())


@pytest.mark.parametrize(("batch_size", "max_length"), [(16, 64), (1, 1024)])
def test_large_batches_and_long_samples_stay_within_the_prediction(
    batch_size: int, max_length: int, tmp_path: Path, own_store: Path
) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    causal("Llama", num_hidden_layers=2, max_position_embeddings=1024, **shape).save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    (tmp_path / "long.jsonl").write_text((json.dumps({"text": WORDS * 200}) + "\n") * 16)
    # A process that has computed before holds free memory, which would hide what this pass takes.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["onelayer.compiler.compile", "transformers.models.llama.modeling_llama"])
    process = context.Process(target=compile_in_child, args=(tmp_path, batch_size, max_length, str(own_store)))
    process.start()
    process.join()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["peak_device_bytes"] <= report["largest_unit_bytes"] + report["workspace_bytes"]
