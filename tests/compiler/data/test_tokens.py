"""Tokens and labels: labels are checked by decoding them, ids by the tokenizer's own call."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from helpers.tiny_models import tiny_tokenizer
from onelayer.compiler.data.batches import make_batches
from onelayer.compiler.data.rows import Example
from onelayer.compiler.data.tokens import IGNORED, Tokens, load_tokenizer, tokenize
from onelayer.compiler.errors import InputError

USER = {"role": "user", "content": "name a city"}
ASSISTANT = {"role": "assistant", "content": "rome"}
MESSAGES = [USER, ASSISTANT, {"role": "user", "content": "another"}, {"role": "assistant", "content": "paris"}]


def labeled_text(tokens: Tokens, tokenizer: Any) -> str:
    """The labeled tokens decoded; labels must be the ids themselves, unshifted."""
    pairs = [(token, label) for token, label in zip(tokens.input_ids, tokens.labels, strict=True) if label != -100]
    assert all(token == label for token, label in pairs)
    return str(tokenizer.decode([token for token, _ in pairs]))


def closing_tokenizer() -> Any:
    """A tokenizer that opens every text with <s> and closes it with </s>."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize("make", [tiny_tokenizer, closing_tokenizer])
def test_text_is_the_tokenizers_default_cut(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer("the quick brown fox").input_ids
    tokens = tokenize(Example("x:1", text="the quick brown fox"), tokenizer, 512)
    assert tokens == Tokens(ids, ids)
    assert tokens.labeled == len(ids) - 1
    assert tokenize(Example("x:1", text="the quick brown fox"), tokenizer, 3) == Tokens(ids[:3], ids[:3])


def test_eos_is_appended_once_and_before_the_cut() -> None:
    plain, closing = tiny_tokenizer(), closing_tokenizer()
    example = Example("x:1", text="the fox")
    ids = plain("the fox").input_ids
    assert tokenize(example, plain, 512, append_eos=True).input_ids == [*ids, 2]
    assert tokenize(example, plain, len(ids), append_eos=True).input_ids == ids
    assert tokenize(example, closing, 512, append_eos=True) == tokenize(example, closing, 512)
    pair = tokenize(Example("x:1", prompt="the ", completion="fox"), plain, 512, append_eos=True)
    assert pair.input_ids[-1] == pair.labels[-1] == 2
    plain.eos_token = None
    with pytest.raises(InputError, match="no eos_token"):
        tokenize(example, plain, 512, append_eos=True)


@pytest.mark.parametrize(
    ("prompt", "completion", "labeled"),
    [
        ("what is one plus two ?", " three", " three"),  # the prompt's ids are a prefix
        ("what is one plus two ? ", "three", " three"),  # the blank joins the completion's first token
        ("what is one pl", "us two", "s two"),  # "p lu s": the token that begins in the prompt is the prompt's
        ("THE ", "Fox jumps", " fox jumps"),
    ],
)
def test_completion_alone_is_labeled(prompt: str, completion: str, labeled: str) -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenize(Example("x:1", prompt=prompt, completion=completion), tokenizer, 512)
    assert tokens.input_ids == tokenizer(prompt + completion).input_ids
    assert labeled_text(tokens, tokenizer).strip() == labeled.strip()


def test_completion_of_a_tokenizer_that_closes_its_texts() -> None:
    tokenizer = closing_tokenizer()
    tokens = tokenize(Example("x:1", prompt="the sum", completion=" is five"), tokenizer, 512)
    assert tokens.input_ids == tokenizer("the sum is five").input_ids
    assert labeled_text(tokens, tokenizer).split() == ["is", "five</s>"]


def test_a_cut_before_the_completion_leaves_nothing_labeled() -> None:
    tokens = tokenize(Example("x:1", prompt="the quick brown fox", completion=" jumps"), tiny_tokenizer(), 2)
    assert tokens.labeled == 0
    assert len(tokens.input_ids) == 2


@pytest.mark.parametrize("generation_tags", [True, False])
def test_assistant_turns_are_labeled_with_marks_and_without(generation_tags: bool) -> None:
    tokenizer = tiny_tokenizer(generation_tags=generation_tags)
    tokens = tokenize(Example("x:1", messages=MESSAGES), tokenizer, 512, append_eos=True)
    assert tokens.input_ids == list(tokenizer.apply_chat_template(MESSAGES)["input_ids"])
    assert labeled_text(tokens, tokenizer).replace(" ", "") == "rome</s>paris</s>"


def test_a_conversation_as_prompt_and_completion_labels_the_completion() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenize(Example("x:1", prompt=MESSAGES[:3], completion=MESSAGES[3:]), tokenizer, 512)
    assert tokens.input_ids == list(tokenizer.apply_chat_template(MESSAGES)["input_ids"])
    assert labeled_text(tokens, tokenizer).replace(" ", "") == "paris</s>"


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_tokenizer_without_offsets(pieces: int) -> None:
    """Slow tokenizers give the same marks; ByT5's bytes need no vocabulary file."""
    from transformers import ByT5Tokenizer

    tokenizer: Any = ByT5Tokenizer()
    tokens = tokenize(Example("x:1", prompt="sum: ", completion="five"), tokenizer, 512)
    assert tokens.input_ids == tokenizer("sum: five").input_ids
    assert labeled_text(tokens, tokenizer) == "five</s>"
    tokenizer.chat_template = tiny_tokenizer(generation_tags=False).chat_template.replace("{{ bos_token }}", "")
    tokens = tokenize(Example("x:1", messages=MESSAGES[: 2 * pieces]), tokenizer, 512)
    assert labeled_text(tokens, tokenizer) == "rome</s>paris</s>"[: 8 * pieces + 1 * (pieces - 1)]


def test_chat_faults() -> None:
    tokenizer = tiny_tokenizer(generation_tags=False)
    example = Example("d.jsonl:4", messages=MESSAGES)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"d\.jsonl:4: messages need a chat template"):
        tokenize(example, tokenizer, 512)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"d\.jsonl:4: .*roles must alternate"):
        tokenize(example, tokenizer, 512)


def test_load_tokenizer(tmp_path: Path) -> None:
    saved = tiny_tokenizer(tmp_path / "good")
    assert load_tokenizer(tmp_path / "good")("the fox").input_ids == saved("the fox").input_ids
    with pytest.raises(InputError, match="no such directory"):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=r"bare: holds no tokenizer; copy .*tokenizer\.json"):
        load_tokenizer(tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(InputError, match="no vocabulary"):
        load_tokenizer(tmp_path / "bare")
    (tmp_path / "good" / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(InputError, match="no tokenizer that can be loaded"):
        load_tokenizer(tmp_path / "good")


@pytest.mark.parametrize("name", ["Gemma3Config", "CodeGenConfig"])
def test_batches_are_made_for_configurations_without_a_padding_token(name: str) -> None:
    config = getattr(transformers, name)()
    assert not hasattr(config, "pad_token_id")
    tokens = [Tokens([3, 4, 5], [3, 4, 5]), Tokens([6, 7, 8], [6, 7, 8])]
    assert [batch.shape for batch in make_batches(tokens, config, 2)] == [(2, 3)]


def test_a_batch_of_an_encoder_decoder_is_as_long_as_what_it_reads() -> None:
    config: Any = transformers.T5Config()
    config.decoder_start_token_id = 0
    asked = [Tokens([3, 4, 5, 6, 7], [IGNORED] * 3 + [6, 7])] * 2
    said = [Tokens([3, 4, 5, 6, 7], [IGNORED, 4, 5, 6, 7])]
    assert [batch.shape for batch in make_batches(asked + said, config, 2)] == [(2, 3), (1, 4)]
