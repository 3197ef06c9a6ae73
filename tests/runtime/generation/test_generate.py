"""Text from models, with adapters and from emulators; equal to what stock loading writes."""

from pathlib import Path

import pytest
import torch

from helpers.classifiers import save_classifier
from helpers.peft_adapters import load_adapter, load_original, random_adapter
from helpers.reference_emulators import write_emulator
from helpers.tiny_models import save_tiny, tiny_tokenizer
from onelayer.compiler.errors import InputError
from onelayer.runtime import generate_text, load_emulator

PROMPT = "the quick brown"


def stock_text(model: torch.nn.Module, chat: bool) -> str:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    if chat:
        turn = [{"role": "user", "content": PROMPT}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    written = model.generate(input_ids=ids, do_sample=False, max_new_tokens=8)  # type: ignore[operator]
    text: str = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("chat", [True, False])
def test_a_model_an_adapter_and_an_emulator(tmp_path: Path, chat: bool) -> None:
    model = save_tiny("llama", tmp_path / "model")
    write_emulator(model, tmp_path / "model", tmp_path / "emulator", ratio=0.5)
    random_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], size=1.0)
    texts = [
        generate_text(tmp_path / "model", PROMPT, max_new_tokens=8, chat=chat).text,
        generate_text(tmp_path / "model", PROMPT, tmp_path / "adapter", max_new_tokens=8, chat=chat).text,
        generate_text(tmp_path / "emulator", PROMPT, max_new_tokens=8, chat=chat).text,
    ]
    adapted = load_adapter(load_original(tmp_path / "model"), tmp_path / "adapter")
    models = [load_original(tmp_path / "model"), adapted, load_emulator(tmp_path / "emulator").eval()]
    assert texts == [stock_text(model, chat) for model in models]
    assert len(set(texts)) == 3


def test_samples_depend_on_the_seed(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    texts = [generate_text(tmp_path, PROMPT, temperature=2.0, seed=seed, max_new_tokens=8).text for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_what_writes_no_text_is_refused(tmp_path: Path) -> None:
    save_classifier("bert", tmp_path)
    with pytest.raises(InputError, match="BertForSequenceClassification writes no text"):
        generate_text(tmp_path, PROMPT)
    with pytest.raises(InputError, match="--prompt: is empty"):
        generate_text(tmp_path, "")
