"""Conversations: what is labeled, by every chat template that TRL ships, and what a template may not leave out."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from helpers.template_table import CALL, CONVERSATIONS, TEMPLATES, TOOLS, assistant, labeled, user
from helpers.tiny_models import tiny_tokenizer
from onelayer.compiler.data.rows import Example
from onelayer.compiler.data.tokens import IGNORED, Tokens, tokenize
from onelayer.compiler.errors import InputError

TABLE = json.loads(Path(__file__).with_name("chat_templates.json").read_text("utf-8"))
TALK = [user("name a city"), assistant("rome"), user("another"), assistant("paris")]


def tokens_of(template: str, messages: list[dict[str, Any]] = TALK, marks: bool = False) -> tuple[Tokens, Any]:
    tokenizer = tiny_tokenizer(generation_tags=marks)
    tokenizer.chat_template = template.replace("PLAIN", tokenizer.chat_template)
    return tokenize(Example("d.jsonl:4", messages=messages), tokenizer, 512), tokenizer


def labels_of(template: str, messages: list[dict[str, Any]] = TALK, marks: bool = False) -> str:
    tokens, tokenizer = tokens_of(template, messages, marks)
    return str(tokenizer.decode([label for label in tokens.labels if label != IGNORED])).replace(" ", "")


# All 41 templates are compiled, and jinja takes 50 ms for each.
def test_labels_of_every_stock_template() -> None:
    assert len(TEMPLATES) == 41
    found = {template: {name: labeled(template, name) for name in CONVERSATIONS} for template in TEMPLATES}
    assert found == TABLE


def test_a_template_that_ends_the_last_turn_otherwise() -> None:
    plain = tiny_tokenizer(generation_tags=False).chat_template
    assert labels_of(plain.replace("eos_token", "(eos_token if loop.last else '')")) == "romeparis</s>"
    assert labels_of(plain.replace("eos_token", "('' if loop.last else eos_token)")) == "rome</s>paris"
    assert labels_of(plain.replace("{{ 'assistant: ' }}", "{{ 'assistant: <think>' }}")) == "rome</s>paris</s>"


@pytest.mark.parametrize("marks", [True, False])
def test_a_turn_of_weight_zero_is_not_learned(marks: bool) -> None:
    weighted = [TALK[0], {**TALK[1], "weight": 0}, TALK[2], {**TALK[3], "weight": 1}]
    assert labels_of("PLAIN", weighted, marks) == "paris</s>"
    assert tokens_of("PLAIN", weighted, marks)[0].input_ids == tokens_of("PLAIN", TALK, marks)[0].input_ids


@pytest.mark.parametrize("content", ["message.content[0].text", "message.content.missing"])
def test_contents_in_parts_and_texts_left_out(content: str) -> None:
    template = "{% for message in messages %}{{ message.role }}: {{ " + content + " }};{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    if "missing" not in content:
        assert labels_of(template) == "rome;paris;"
        return
    with pytest.raises(InputError, match=r"d\.jsonl:4: .* leaves out the text of message 0 \(user\); remove"):
        labels_of(template)


def test_an_answer_left_out_and_calls_left_out_are_refused() -> None:
    last = "{% if loop.last %}{{ message.role }}: {{ message.content }};{% endif %}"
    with pytest.raises(InputError, match=r"leaves out the text of message 0 \(user\)"):
        labels_of("{% for message in messages %}" + last + "{% endfor %}")
    calls = [user("sum"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "9"}, assistant("nine")]
    with pytest.raises(InputError, match=r"leaves out the calls of message 1 \(assistant\)"):
        labels_of("PLAIN", calls)
    example = Example("d.jsonl:4", messages=TALK, tools=TOOLS)
    with pytest.raises(InputError, match="does not write 'tools'"):
        tokenize(example, tiny_tokenizer(), 512)


def test_the_date_of_a_template_is_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ strftime_now('%d %b %Y, %-d') }} PLAIN"
    first, tokenizer = tokens_of(template)
    assert "26 jul 2024, 26" in tokenizer.decode(first.input_ids)

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Tomorrow":
            return cls(2031, 1, 2)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert tokens_of(template)[0].input_ids == first.input_ids


@pytest.mark.parametrize("special", [True, False])
def test_special_tokens_of_a_text_are_not_doubled(special: bool) -> None:
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    if special:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    plain = tokenizer("the fox", add_special_tokens=False).input_ids
    for example in (Example("x:1", text="<s>the fox</s>"), Example("x:1", prompt="<s>the", completion=" fox</s>")):
        assert tokenize(example, tokenizer, 512).input_ids == [1, *plain, 2]
        assert tokenize(example, tokenizer, 512, append_eos=True).input_ids == [1, *plain, 2]
    cut = tokenize(Example("x:1", text="the fox"), tokenizer, 2)
    assert (len(cut.input_ids), cut.cut) == (2, True)
    assert not tokenize(Example("x:1", text="the fox"), tokenizer, 512).cut
