"""Multiple choice by log-likelihood, and an emulator compared with its original; full logits are the oracle."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.peft_adapters import random_adapter
from helpers.reference_emulators import write_emulator
from helpers.tiny_models import save_tiny, tiny_llama
from onelayer.compiler.data.readers import read_examples
from onelayer.compiler.data.tokens import load_tokenizer, tokenize
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.command import evaluate_model
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.compiler.streaming.token_scores import Divergence, TokenScores
from onelayer.runtime import load_emulator

QUESTIONS: list[dict[str, Any]] = [
    {"prompt": "name a city : ", "choices": ["rome", "blue", "the lazy dog"], "answer": 0},
    {"prompt": "one plus two is ", "choices": ["three", "five"], "answer": "five"},
    {"prompt": [{"role": "user", "content": "name a colour"}], "choices": ["blue", "fox", "box", "jugs"], "answer": 2},
    {"prompt": "the sum is ", "choices": ["eight", "seven ?"], "answer": 1},
]
TEXT = {"text": "the quick brown fox jumps over the lazy dog"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [QUESTIONS[0], TEXT, *QUESTIONS[1:]]))
    return file


def likelihoods(model: Any, directory: Path, data: Path) -> list[list[float]]:
    """Compute the log-likelihood of each choice of each example, one resident forward each."""
    tokenizer = load_tokenizer(directory)
    found = []
    for example in read_examples(data):
        row = []
        for number in range(len(example.choices or ())):
            tokens = tokenize(example.with_choice(number), tokenizer, 512)
            with torch.no_grad():
                logits = model(torch.tensor([tokens.input_ids])).logits[0, :-1].double()
            labels = torch.tensor(tokens.labels[1:])
            row.append(-float(F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)))
        found.append(row)
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_choice_of_highest_likelihood_is_taken(name: str, batch_size: int, tmp_path: Path, data: Path) -> None:
    model = save_tiny(name, tmp_path / "model")
    adapted = random_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], size=0.6)
    result = evaluate_model(tmp_path / "model", data, adapters=[tmp_path / "adapter"], batch_size=batch_size)
    answers = [example.answer for example in read_examples(data)]
    for score, reference in zip(result.results, (None, adapted), strict=True):
        with adapted.disable_adapter() if reference is None else torch.no_grad():
            found = likelihoods(adapted, tmp_path / "model", data)
        right = [
            max(range(len(row)), key=row.__getitem__) == answer
            for row, answer in zip(found, answers, strict=True)
            if row
        ]
        assert (score.choice_accuracy, score.questions) == (sum(right) / 4, 4)


def test_the_loss_counts_the_right_choice_as_if_it_were_the_completion(tmp_path: Path, data: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    rows: list[dict[str, Any]] = [TEXT]
    for row in QUESTIONS:
        number = row["answer"] if isinstance(row["answer"], int) else row["choices"].index(row["answer"])
        choice = row["choices"][number]
        chat = isinstance(row["prompt"], list)
        rows.append(
            {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": choice}] if chat else choice}
        )
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with_choices, without = (evaluate_model(tmp_path / "model", file).results[0] for file in (data, plain))
    assert with_choices.loss == pytest.approx(without.loss, rel=1e-6)
    assert (with_choices.tokens, with_choices.token_accuracy) == (without.tokens, without.token_accuracy)
    assert (without.choice_accuracy, without.questions) == (None, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["rome"]}, "two texts or more"),
        ({"choices": ["rome", "rome"]}, "a text twice"),
        ({"choices": ["rome", ""]}, r"choices\[1\]' is empty"),
        ({"answer": 3}, "counted from 0"),
        ({"answer": True}, "counted from 0"),
        ({"answer": "paris"}, "counted from 0"),
        ({"answer": None}, "counted from 0"),
    ],
)
def test_a_question_that_cannot_be_scored_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({**QUESTIONS[0], **change}))
    with pytest.raises(InputError, match=message):
        read_examples(tmp_path / "q.jsonl")


def test_a_choice_is_never_cut(tmp_path: Path, data: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    with pytest.raises(InputError, match="more than 5 tokens; raise --max-length"):
        evaluate_model(tmp_path / "model", data, max_length=5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe", "t5"])
def test_against_is_what_the_resident_emulator_says(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, emulator = tmp_path / "original", tmp_path / "emulator"
    model = save_tiny(family, original, shards=2)
    skip = ("experts", "gate") if "moe" in family else ()
    write_emulator(model, original, emulator, ratio=0.4, skip=skip)
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps(TEXT) + "\n" + json.dumps({"prompt": "one plus two is ", "completion": "three"}) + "\n")
    monkeypatch.setattr("onelayer.compiler.models.lazy_tensors.SLICE_BYTES", 13 * 32 * 4)
    monkeypatch.setattr("onelayer.compiler.evaluate.scoring.SLICE_BYTES", 13 * 4 * 5)
    result = evaluate_model(original, file, against=emulator, batch_size=2)
    kl, agreed, losses = resident_divergence(model, load_emulator(emulator), original, file)
    assert result.against is not None
    assert result.against.kl_per_token == pytest.approx(float(kl.mean()), rel=2e-4)
    assert result.against.top1_agreement == pytest.approx(float(agreed.float().mean()))
    assert result.against.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert [score.adapter for score in result.results] == [None]
    assert evaluate_model(original, file).results == result.results


def resident_divergence(
    model: Any, small: Any, directory: Path, data: Path
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from onelayer.compiler.data.batches import make_batches
    from onelayer.compiler.data.labeled_rows import read_tokens

    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for batch in make_batches(read_tokens(data, load_tokenizer(directory), 512), model.config, 1):
        with torch.no_grad():
            p, q = (each(**batch.inputs).logits.double()[batch.targets != -100] for each in (model, small))
        labels = batch.targets[batch.targets != -100]
        kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        parts.append((kl, p.argmax(-1) == q.argmax(-1), F.cross_entropy(q, labels, reduction="none")))
    kl, agreed, losses = (torch.cat(column) for column in zip(*parts, strict=True))
    return kl, agreed, losses


def test_an_exact_emulator_agrees_and_adapters_are_scored_beside_it(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "original")
    write_emulator(model, tmp_path / "original", tmp_path / "emulator", ratio=1.0)
    random_adapter(model, tmp_path / "adapter", target_modules="all-linear", size=0.6)
    (tmp_path / "text.jsonl").write_text(json.dumps(TEXT))
    paths: dict[str, Any] = {"adapters": [tmp_path / "adapter"], "against": tmp_path / "emulator"}
    result = evaluate_model(tmp_path / "original", tmp_path / "text.jsonl", **paths)
    assert result.against is not None
    assert result.against.kl_per_token is not None
    assert result.against.kl_per_token < 1e-6
    assert result.against.top1_agreement == 1.0
    assert result.results[1].loss != pytest.approx(result.results[0].loss, rel=1e-2)
    alone = evaluate_model(tmp_path / "original", tmp_path / "text.jsonl", adapters=[tmp_path / "adapter"])
    assert alone.results == result.results
    factors = sum(
        info.size_bytes for info in Checkpoint.open(tmp_path / "emulator").tensors.values() if ".lr_" in info.name
    )
    rows = len(load_tokenizer(tmp_path / "original")(TEXT["text"])["input_ids"])
    assert 0 <= result.report.bytes_read - alone.report.bytes_read - factors <= rows * 32 * 4


def test_an_emulator_of_another_model_is_refused_by_digest(tmp_path: Path, data: Path) -> None:
    model = save_tiny("llama", tmp_path / "original")
    write_emulator(model, tmp_path / "original", tmp_path / "emulator")
    save_tiny("qwen2", tmp_path / "other")
    with pytest.raises(InputError, match="is an emulator of example/original"):
        evaluate_model(tmp_path / "other", data, against=tmp_path / "emulator")


@pytest.mark.parametrize(
    ("record", "message"),
    [({"base": {"digest": "0" * 64}}, "was made for another original"), (None, "made for .*q_proj.* has")],
)
def test_an_adapter_of_another_model_is_refused_in_one_line(
    record: dict[str, Any] | None, message: str, tmp_path: Path, data: Path
) -> None:
    save_tiny("llama", tmp_path / "model")
    random_adapter(tiny_llama(hidden_size=64), tmp_path / "adapter", target_modules=["q_proj"])
    if record is not None:
        (tmp_path / "adapter" / "onelayer.json").write_text(json.dumps({"kind": "adapter", **record}))
    with pytest.raises(InputError, match=message):
        evaluate_model(tmp_path / "model", data, adapters=[tmp_path / "adapter"])


@settings(max_examples=50)
@given(
    st.integers(1, 9),
    st.integers(2, 40),
    st.integers(1, 40),
    st.integers(0, 10**6),
    st.sampled_from([1.0, 30.0, 300.0]),
)
def test_divergence_by_slices_is_that_of_the_whole(
    count: int, vocabulary: int, width: int, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(count, vocabulary, generator=generator) * scale for _ in range(2))
    labels = torch.randint(vocabulary, (count,), generator=generator)
    scores, gap = (TokenScores(labels), TokenScores(labels)), Divergence(count, torch.device("cpu"))
    for start in range(0, vocabulary, width):
        parts = p[:, start : start + width], q[:, start : start + width]
        for item, part in zip(scores, parts, strict=True):
            item.update(slice(None), part, start)
        gap.update(slice(None), *parts)
    wanted = F.kl_div(q.double().log_softmax(-1), p.double().log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(gap.divergences(*scores), wanted, rtol=1e-5, atol=1e-4)


def test_a_token_that_the_original_excludes_counts_nothing() -> None:
    p, q = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]])
    scores, gap = (TokenScores(torch.tensor([0])), TokenScores(torch.tensor([0]))), Divergence(1, torch.device("cpu"))
    for item, part in zip(scores, (p, q), strict=True):
        item.update(slice(None), part, 0)
    gap.update(slice(None), p, q)
    assert float(gap.divergences(*scores)) == pytest.approx(0.6931, abs=1e-4)


def test_a_loss_beyond_any_perplexity_loses_no_score(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(json.dumps(TEXT) + "\n")
    (score,) = evaluate_model(tmp_path / "model", tmp_path / "data.jsonl").results
    assert score.loss > 1000
    assert score.perplexity == pytest.approx(sys.float_info.max)
