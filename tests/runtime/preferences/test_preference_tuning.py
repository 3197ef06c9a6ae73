"""Preference tuning on an emulator: TRL's trainers, with the reference of the streamed original."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.reference_emulators import write_emulator
from helpers.tiny_models import save_tiny
from onelayer.compiler import correct_adapter, evaluate_model, reference_scores
from onelayer.compiler.adapters.reader import adapter_digest
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.reference import REFERENCE_FILE
from onelayer.runtime import train_lora
from onelayer.runtime.training.preference_trainers import DpoTrainer, KtoTrainer

PROMPTS = ["the quick brown fox", "jumps over the", "what is the sum of", "lazy dog"]
PAIRS = [{"prompt": prompt, "chosen": " it is five", "rejected": " rome and two"} for prompt in PROMPTS]
LONE = [
    {"prompt": prompt, "completion": answer, "label": label}
    for prompt, *answers in zip(PROMPTS, [" it is five", " blue", " eight", " fox"], [" rome"] * 4, strict=True)
    for answer, label in zip(answers, (True, False), strict=True)
]
QUICK: dict[str, Any] = {"max_steps": 2, "batch_size": 2, "lora_rank": 4, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("preferences")
    model = save_tiny("llama", root / "original")
    write_emulator(model, root / "original", root / "half", ratio=0.5, base_revision="abc")
    for name, rows in (("pairs", PAIRS), ("lone", LONE)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def train(place: Path, output: Path, method: str, **settings: Any) -> Any:
    data = place / ("pairs.jsonl" if method == "dpo" else "lone.jsonl")
    return train_lora(place / "half", data, output, **{**QUICK, "method": method, **settings})


def log_probability(model: Any, tokenizer: Any, prompt: str, answer: str) -> torch.Tensor:
    """The answer's log-probability with an end token, by the resident model."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id])
    logits = model(ids[None]).logits[0, :-1].float().log_softmax(dim=-1)
    picked: torch.Tensor = logits.gather(1, ids[1:, None])[len(prompt_ids) - 1 :].sum()
    return picked


def test_the_loss_compares_the_emulator_with_the_original(place: Path, tmp_path: Path) -> None:
    import onelayer.runtime.modules.transformers_plugin  # noqa: F401

    result = train(place, tmp_path / "adapter", "dpo", model=place / "original", max_steps=1, batch_size=4)
    tokenizer = AutoTokenizer.from_pretrained(place / "original")
    original, emulator = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("original", "half"))
    with torch.no_grad():
        gains = [
            {side: _gain(emulator, original, tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")}
            for row in PAIRS
        ]
    margins = torch.stack([gain["chosen"] - gain["rejected"] for gain in gains])
    assert margins.abs().min() > 1e-3  # the reference is not the emulator itself
    assert result.train_loss == pytest.approx(float(-logsigmoid(0.1 * margins).mean()), rel=1e-4)
    assert result.reference.bytes_read > 0
    assert result.reference.peak_device_bytes > 0


def _gain(emulator: Any, original: Any, tokenizer: Any, prompt: str, answer: str) -> torch.Tensor:
    values = [log_probability(model, tokenizer, prompt, answer) for model in (emulator, original)]
    return values[0] - values[1]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_reference_made_before_gives_the_same_bytes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    data = place / ("pairs.jsonl" if method == "dpo" else "lone.jsonl")
    arguments: dict[str, Any] = {"method": method, "train_batch_size": 2}
    made = reference_scores(place / "original", data, tmp_path / "reference", **arguments, eval_data=data)
    assert made.answers == len(json.loads((tmp_path / "reference" / REFERENCE_FILE).read_text())["log_probabilities"])
    forwards: list[int] = []
    trainer = DpoTrainer if method == "dpo" else KtoTrainer
    monkeypatch.setattr(trainer, "compute_ref_log_probs", lambda *given: forwards.append(1))
    settings: dict[str, Any] = {"eval_data": data, "learning_rate": 1e-2}
    own = train(place, tmp_path / "own", method, model=place / "original", **settings)
    given = train(place, tmp_path / "given", method, reference=tmp_path / "reference", **settings)
    assert adapter_digest(tmp_path / "own") == adapter_digest(tmp_path / "given")
    assert (own.train_loss, own.held_out) == (given.train_loss, given.held_out)
    assert given.reference is None
    assert own.held_out[0].step == 2
    assert (own.held_out[0].preference_accuracy is None) == (method == "kto")
    assert not forwards
    if method == "kto":  # other batches pair other answers
        with pytest.raises(InputError, match="same data, method, max_length and batch size"):
            train(place, tmp_path / "other", method, reference=tmp_path / "reference", batch_size=3)


def test_an_interrupted_run_does_not_score_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"model": place / "original", "save_steps": 1, "max_steps": 3}
    calm = train(place, tmp_path / "calm", "dpo", **settings)
    real, steps = DpoTrainer.training_step, []

    def killed(self: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 3:
            raise RuntimeError("power")
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(DpoTrainer, "training_step", killed)
    with pytest.raises(RuntimeError, match="power"):
        train(place, tmp_path / "out", "dpo", **settings)
    result = train(place, tmp_path / "out", "dpo", **settings, resume=True)
    assert adapter_digest(tmp_path / "out") == adapter_digest(tmp_path / "calm")
    assert result.reference is None
    assert calm.losses == result.losses


def test_preferences_can_be_anchored_and_compressed(place: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": place / "original", "batch_size": 4, "max_steps": 1}
    result = train(place, tmp_path / "anchored", "dpo", anchor_every=1, anchor_bits=32, activations="layer", **settings)
    # Anchored, the emulator answers as the original does, so that no answer has gained anything yet.
    assert result.train_loss == pytest.approx(math.log(2), abs=1e-4)
    assert train(place, tmp_path / "plain", "dpo", **settings).train_loss != pytest.approx(math.log(2), abs=1e-4)


def test_both_calls_of_kto_are_anchored(place: Path, tmp_path: Path) -> None:
    """Its loss is a half where policy and reference are equal in both calls (arXiv 2402.01306)."""
    settings: dict[str, Any] = {"model": place / "original", "batch_size": 4, "max_steps": 1}
    anchors: dict[str, Any] = {"anchor_every": 1, "anchor_bits": 32, "activations": "layer"}
    result = train(place, tmp_path / "anchored", "kto", **anchors, **settings)
    assert result.train_loss == pytest.approx(0.5, abs=1e-5)
    assert train(place, tmp_path / "plain", "kto", **settings).train_loss != pytest.approx(0.5, abs=1e-4)


def test_a_plain_model_is_its_own_reference(place: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "max_steps": 1, "batch_size": 4}
    result = train_lora(place / "original", place / "pairs.jsonl", tmp_path / "direct", method="dpo", **settings)
    assert result.train_loss == pytest.approx(math.log(2), abs=1e-5)


def test_the_adapter_prefers_what_was_chosen(place: Path, tmp_path: Path) -> None:
    train(place, tmp_path / "adapter", "dpo", model=place / "original", max_steps=20, learning_rate=1e-2)
    correct_adapter(
        tmp_path / "adapter", emulator=place / "half", model=place / "original", output=tmp_path / "corrected"
    )
    scores = evaluate_model(place / "original", place / "pairs.jsonl", adapters=[tmp_path / "corrected"]).results
    assert [score.preferences for score in scores] == [4, 4]
    assert scores[0].preference_accuracy is None
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(place / "original"), tmp_path / "corrected"
    )
    tokenizer = AutoTokenizer.from_pretrained(place / "original")
    right = 0
    with torch.no_grad():
        for row in PAIRS:
            gains = []
            for side in ("chosen", "rejected"):
                ids = torch.tensor(tokenizer(row["prompt"] + row[side])["input_ids"])
                start = len(tokenizer(row["prompt"])["input_ids"])
                values = []
                for context in (adapted.disable_adapter, _nothing):
                    with context():
                        rows = adapted(ids[None]).logits[0, :-1].float().log_softmax(dim=-1)
                    values.append(rows.gather(1, ids[1:, None])[start - 1 :].sum())
                gains.append(values[1] - values[0])
            right += int(gains[0] > gains[1])
    assert scores[1].preference_accuracy == right / 4
    assert right >= 3


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dpo"}, "--method dpo: the original is the reference of an emulator; give --model"),
        (
            {"method": "dpo", "data": "lone", "model": "original"},
            r"jsonl:1: --method dpo needs 'prompt' with 'chosen'",
        ),
        ({"data": "pairs"}, r"pairs\.jsonl:1: is a preference; train with --method dpo or kto"),
        ({"data": "lone"}, r"lone\.jsonl:1: is a preference"),
        ({"method": "dpo", "model": "original", "dropout": 0.1}, "--dropout: dpo and kto train without"),
        ({"method": "dpo", "model": "original", "args": {"sync_ref_model": True}}, r"args\.sync_ref_model: cannot be"),
        ({"method": "dpo", "model": "original", "args": {"packing": True}}, r"args\.packing: unknown field"),
        ({"method": "rlhf"}, "method: input should be 'sft', 'dpo' or 'kto', not 'rlhf'"),
    ],
)
def test_refusals(place: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    given = dict(settings)
    data = place / f"{given.pop('data', 'lone' if given.get('method') == 'kto' else 'pairs')}.jsonl"
    if "model" in given:
        given["model"] = place / given["model"]
    with pytest.raises(InputError, match=message):
        train_lora(place / "half", data, tmp_path / "adapter", **{**QUICK, **given})


def test_a_reference_of_another_original_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / REFERENCE_FILE).write_text('{"base_digest": "x", "log_probabilities": {}}')
    with pytest.raises(InputError, match="is of another original than the emulator"):
        train(place, tmp_path / "adapter", "dpo", reference=tmp_path / "reference")


def test_trl_still_has_what_the_trainers_rely_on() -> None:
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer

    for stock in (DPOTrainer, KTOTrainer):
        assert "_prepare_dataset" in vars(stock), f"{stock.__name__} prepares its data elsewhere"
        assert "precompute_ref_logps" in vars(stock)["_compute_loss"].__code__.co_names


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_streamed_original_is_scored_once_and_then_read_as_for_answers(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    forwards: list[int] = []
    trainer = DpoTrainer if method == "dpo" else KtoTrainer
    data = place / ("pairs.jsonl" if method == "dpo" else "lone.jsonl")

    def run(name: str, rows: Path = data, **settings: Any) -> Any:
        return train_lora(place / "original", rows, tmp_path / name, **{**QUICK, "method": method, **settings})

    resident = run("resident", way="resident")
    monkeypatch.setattr(trainer, "compute_ref_log_probs", lambda *given: forwards.append(1))
    streamed = run("streamed", way="streamed")
    assert not forwards
    assert streamed.train_loss == pytest.approx(resident.train_loss, rel=1e-5)
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("streamed", "resident"))
    assert all((found[name] - expected[name]).abs().max() < 2e-6 for name in expected)
    assert streamed.reference.bytes_read > 0
    assert resident.reference is None
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in PROMPTS))
    answers = run("sft", place / "texts.jsonl", method="sft", way="streamed")
    # KTO also runs every step forward over the answers of other prompts.
    passes = 0 if method == "dpo" else QUICK["max_steps"]
    more = streamed.streamed.bytes_read - answers.streamed.bytes_read - passes * streamed.reference.bytes_read
    assert more < 0.02 * answers.streamed.bytes_read, "rows of the embedding are all that longer texts read in addition"
