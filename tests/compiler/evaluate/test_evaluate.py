"""Streamed scores compared with the resident model with PEFT's own adapters, for every form of data."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from helpers.peft_adapters import random_adapter
from helpers.tiny_models import TINY, save_tiny
from onelayer.compiler.data.batches import make_batches
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.data.tokens import load_tokenizer
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.command import evaluate_model
from onelayer.compiler.streaming.token_scores import TokenScores

ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "the quick brown fox jumps over the lazy dog"}, {"text": "what is the sum of two"}],
    "pair": [{"prompt": "name a city : ", "completion": "rome"}, {"prompt": "one plus two is ", "completion": "three"}],
    "chat": [{"messages": [{"role": "user", "content": "name a colour"}, {"role": "assistant", "content": "blue"}]}],
}
TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value", "dense"],
    "t5": ["q", "v", "wo"],
    "phi3": ["qkv_proj", "o_proj"],
}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    for form, rows in ROWS.items():
        (tmp_path / f"{form}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {form: tmp_path / f"{form}.jsonl" for form in ROWS}


def test_a_score_that_is_not_finite_is_a_failure(tmp_path: Path, data: dict[str, Path]) -> None:
    model = save_tiny("llama", tmp_path / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(FloatingPointError, match=r"the loss is nan: outputs overflow"):
        evaluate_model(tmp_path / "model", data["text"])


def resident_score(model: Any, directory: Path, data: Path, max_length: int = 512) -> tuple[float, float, int]:
    """Compute loss, accuracy and count by their definitions, from full logits of the resident model."""
    losses, correct, count = 0.0, 0, 0
    for batch in make_batches(read_tokens(data, load_tokenizer(directory), max_length), model.config, 1):
        with torch.no_grad():
            logits = model(**batch.inputs).logits.float()
        rows = batch.targets != -100
        losses += float(F.cross_entropy(logits[rows].double(), batch.targets[rows], reduction="sum"))
        correct += int((logits[rows].argmax(-1) == batch.targets[rows]).sum())
        count += int(rows.sum())
    return losses / count, correct / count, count


@pytest.mark.parametrize("name", [name for name in TINY if name != "bert"])
def test_base_and_adapters_in_one_pass_equal_the_resident_model(
    name: str, tmp_path: Path, data: dict[str, Path]
) -> None:
    directory = tmp_path / "model"
    model = save_tiny(name, directory, shards=3)
    paths = [tmp_path / "a", tmp_path / "b"]
    targets = TARGETS.get(name, ["q_proj", "v_proj"])
    fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
    for number, path in enumerate(paths):
        options: dict[str, Any] = {"r": 3, "lora_alpha": 7, "use_rslora": number == 1, **fan}
        random_adapter(type(model).from_pretrained(directory), path, seed=number, target_modules=targets, **options)
    result = evaluate_model(directory, data["text"], adapters=paths)
    assert [score.adapter for score in result.results] == [None, *map(str, paths)]
    losses = set()
    for score, adapter in zip(result.results, [None, *paths], strict=True):
        reference = type(model).from_pretrained(directory).eval()
        if adapter is not None:
            reference = PeftModel.from_pretrained(reference, adapter).eval()
        loss, accuracy, count = resident_score(reference, directory, data["text"])
        assert score.loss == pytest.approx(loss, rel=1e-5)
        assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        assert (score.token_accuracy, score.tokens) == (accuracy, count)
        losses.add(round(score.loss, 6))
    assert len(losses) == 3, "adapters that change nothing would prove nothing"


@pytest.mark.parametrize("form", ["pair", "chat"])
def test_only_completions_and_assistant_turns_count(form: str, tmp_path: Path, data: dict[str, Path]) -> None:
    model = save_tiny("llama", tmp_path / "model")
    score = evaluate_model(tmp_path / "model", data[form]).results[0]
    loss, _, count = resident_score(model, tmp_path / "model", data[form])
    assert score.loss == pytest.approx(loss, rel=1e-5)
    text = "".join(str(row) for row in ROWS[form])
    assert 0 < score.tokens == count < len(text)


def test_slices_of_the_head_and_of_the_rows_change_nothing(
    tmp_path: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("gemma2", tmp_path)
    looks = list[int]()
    monkeypatch.setattr("onelayer.compiler.evaluate.scoring.FreedMemory.after_unit", lambda _, kept: looks.append(kept))
    whole = evaluate_model(tmp_path, data["text"]).results[0]
    looks_at_whole = len(looks)
    monkeypatch.setattr("onelayer.compiler.models.lazy_tensors.SLICE_BYTES", 13 * 32 * 4)
    monkeypatch.setattr("onelayer.compiler.evaluate.scoring.SLICE_BYTES", 13 * 4 * 5)
    sliced = evaluate_model(tmp_path, data["text"]).results[0]
    assert len(looks) > 3 * looks_at_whole, "memory is looked at after every piece"
    assert sliced.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (sliced.token_accuracy, sliced.tokens) == (whole.token_accuracy, whole.tokens)


def test_texts_are_cut_at_max_length(tmp_path: Path, data: dict[str, Path]) -> None:
    save_tiny("llama", tmp_path)
    assert evaluate_model(tmp_path, data["text"], max_length=5).results[0].tokens == 2 * 4


def test_one_more_adapter_reads_no_more_of_the_layers(tmp_path: Path, data: dict[str, Path]) -> None:
    model = save_tiny("llama", tmp_path / "model")
    random_adapter(model, tmp_path / "a", target_modules=["q_proj"])
    alone = evaluate_model(tmp_path / "model", data["text"]).report.bytes_read
    both = evaluate_model(tmp_path / "model", data["text"], adapters=[tmp_path / "a"]).report.bytes_read
    rows = sum(len(item.input_ids) for item in read_tokens(data["text"], load_tokenizer(tmp_path / "model"), 512))
    assert both - alone <= rows * 32 * 4, "only embedding rows may be read again"


def test_a_model_that_predicts_no_next_token_is_refused(tmp_path: Path, data: dict[str, Path]) -> None:
    save_tiny("bert", tmp_path)
    with pytest.raises(InputError, match="predicts no next token"):
        evaluate_model(tmp_path, data["text"])


def test_a_dora_adapter_is_refused_by_name(tmp_path: Path, data: dict[str, Path]) -> None:
    model = save_tiny("llama", tmp_path / "model")
    random_adapter(model, tmp_path / "a", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(InputError, match="DoRA"):
        evaluate_model(tmp_path / "model", data["text"], adapters=[tmp_path / "a"])


@settings(max_examples=50)
@given(
    st.integers(1, 9),
    st.integers(2, 40),
    st.integers(1, 40),
    st.integers(0, 10**6),
    st.sampled_from([1.0, 30.0, 1000.0]),
)
def test_scores_by_slices_equal_the_whole(count: int, vocabulary: int, width: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, vocabulary, generator=generator) * scale
    labels = torch.randint(vocabulary, (count,), generator=generator)
    scores = TokenScores(labels)
    for start in range(0, vocabulary, width):
        scores.update(slice(None), logits[:, start : start + width], start)
    expected = float(F.cross_entropy(logits.double(), labels, reduction="sum"))
    assert float(scores.losses.sum()) == pytest.approx(expected, rel=1e-6, abs=1e-5)
    assert int(scores.hits.sum()) == int((logits.argmax(-1) == labels).sum())
