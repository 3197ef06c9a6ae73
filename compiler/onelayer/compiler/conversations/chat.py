"""A conversation and a chat template in, its text out; messages whose text the template leaves out are refused.

A template is a program: it may trim texts, drop reasoning from earlier turns, or want contents in another form.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from onelayer.compiler.conversations.parts import Message, text_of, texts_of, with_text
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.time_limit import TimeLimitError, time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_SECONDS = 10.0  # a thousand times what a template takes for a long conversation
# Characters for private use, which no text of a data set has: they equal no character that a template writes.
MARK = "\ue000\ue001\ue002"
MARK_NUMBER = 918273645918273645  # in place of a number, which a template may write without quotes
# Some templates write today's date. Here that is always this day, the default of Llama's templates: a result must not
# depend on the day, nor may a resumed run differ from the run it takes up. transformers passes no function to a
# template, so the function is a macro in front of it.
TODAY = datetime(2024, 7, 26)
DIRECTIVES = ("%-d", "%-m", *(f"%{letter}" for letter in "aAbBdHIjmMpSyY"))
GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
Span = tuple[int, int]  # characters [start, end) of a text
DATE_MACRO = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f" | replace('{directive}', '{TODAY.strftime(directive)}')" for directive in DIRECTIVES)
    + " -}}{%- endmacro %}\n"
)


class MissingTextError(InputError):
    """A message whose text or calls are not in the rendering. `index` is its place; -1 for the tools."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


@dataclass(frozen=True)
class Chat:
    """A conversation for one template. `tools` are JSON schemas of the functions that its messages may call.

    `parts`: contents are lists of parts, not strings. `json_arguments`: the arguments of calls are JSON texts, not
    objects. `source` names the row in messages.
    """

    source: str
    messages: Sequence[Message]
    tokenizer: "PreTrainedTokenizerBase"
    tools: list[Any] | None = None
    parts: bool = False
    json_arguments: bool = False

    def checked(self) -> "Chat":
        """Return the conversation with contents and arguments in the form that the template takes.

        Raises `InputError` if the template refuses the messages, or does not write all of their texts.
        """
        faults: list[InputError] = []
        for form in (self, replace(self, parts=True), replace(self, json_arguments=True)):
            try:
                form._check_texts()
            except InputError as fault:
                faults.append(fault)
            else:
                return form
        missing = [fault for fault in faults if isinstance(fault, MissingTextError)]
        raise max(missing, key=lambda fault: fault.index) if missing else faults[0]

    @cached_property
    def text(self) -> str:
        """The whole rendering."""
        return self.render(self.messages)

    @property
    def name(self) -> str:
        """The name of the tokenizer in messages."""
        return str(self.tokenizer.name_or_path or "this tokenizer")

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `apply_chat_template` other than the messages."""
        template = self.tokenizer.get_chat_template(tools=self.tools)
        dated = DATE_MACRO + template if "strftime_now" in template else template
        return {"tools": self.tools, "chat_template": dated}

    @cached_property
    def generation_spans(self) -> list[Span] | None:
        """The characters between the template's own `{% generation %}` marks; None if it has none."""
        from transformers.utils.chat_template_utils import render_jinja_template

        if not GENERATION_MARK.search(self.arguments["chat_template"]):
            return None
        arguments: dict[str, Any] = {**self.arguments, **self.tokenizer.special_tokens_map}
        with self.faults():
            rendered: Any = render_jinja_template([self.prepared], return_assistant_tokens_mask=True, **arguments)
        texts, spans = rendered
        assert texts == [self.text], "rendered by the same template"
        return [(first, last) for first, last in spans[0]]

    @property
    def prepared(self) -> list[Message]:
        """The messages as the template takes them."""
        return [self._prepared(message) for message in self.messages]

    def render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """Render messages, with `prompt` up to where the assistant answers. Raises `InputError` if refused."""
        with self.faults():
            text = self.tokenizer.apply_chat_template(
                [self._prepared(message) for message in messages],
                tokenize=False,
                add_generation_prompt=prompt,
                **self.arguments,
            )
        assert isinstance(text, str)
        return text

    def rendered(self, messages: Sequence[Message], prompt: bool = False) -> str | None:
        """Render messages; None if the template refuses them."""
        try:
            return self.render(messages, prompt)
        except InputError:
            return None

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Raise `InputError` if all that is rendered inside takes too long: a template can loop for years."""
        try:
            with time_limit(TEMPLATE_SECONDS):
                yield
        except TimeLimitError:
            raise InputError(
                f"{self.source}: the chat template of {self.name} takes more than {TEMPLATE_SECONDS:.0f} s for these "
                "messages; give a model with another template"
            ) from None

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Turn what a chat template raises (roles that must alternate, unknown keys) into an `InputError`."""
        from jinja2 import TemplateError

        try:
            yield
        except (TemplateError, TypeError, ValueError) as error:
            text = str(error).strip().partition("\n")[0]
            raise InputError(
                f"{self.source}: the chat template of {self.name} refuses the messages ({text}); change their roles, "
                "or write 'text'"
            ) from None

    def _check_texts(self) -> None:
        """Raise `InputError` if the template leaves out the text of a message, or the tools."""
        marks = [f"{MARK}{chr(0xE100 + index % 0x1000)}" for index in range(len(self.messages))]
        texts = [
            with_text(message, mark) if text_of(message).strip() else message
            for message, mark in zip(self.messages, marks, strict=True)
        ]
        text, reached = self.render(texts), 0
        for index, message in enumerate(self.messages):
            place = text.find(marks[index]) if text_of(message).strip() else reached
            calls_lost = self._lacks_calls(index)
            if place < 0 or calls_lost or not _shown(message, self.text):
                what = "calls" if calls_lost else "text"
                raise MissingTextError(
                    f"{self.source}: the chat template of {self.name} leaves out the {what} of message {index} "
                    f"({message['role']}); remove the message, or add a chat_template.jinja that writes it",
                    index,
                )
            if place < reached:
                raise InputError(
                    f"{self.source}: the chat template of {self.name} writes the text of message {index - 1} after "
                    f"that of message {index}; remove the text of a message that calls tools"
                )
            reached = place
        if self.tools and replace(self, tools=None).rendered(self.messages) == self.text:
            raise MissingTextError(
                f"{self.source}: the chat template of {self.name} does not write 'tools'; remove the field, or add a "
                "chat_template.jinja that does",
                -1,
            )

    def _lacks_calls(self, index: int) -> bool:
        if not self.messages[index].get("tool_calls"):
            return False
        return (
            mark_span(self.render([*self.messages[:index], marked(self.messages[index]), *self.messages[index + 1 :]]))[
                0
            ]
            < 0
        )

    def _prepared(self, message: Message) -> Message:
        own = {name: value for name, value in message.items() if name != "weight"}  # for the loss, not for the template
        if self.parts and isinstance(own["content"], str):
            own["content"] = [{"type": "text", "text": own["content"]}]
        if self.json_arguments and "tool_calls" in own:
            own["tool_calls"] = [_with_json_arguments(call) for call in own["tool_calls"]]
        return own


def has_text(message: Message) -> bool:
    """Return whether a message has a text or calls."""
    return bool(text_of(message).strip() or message.get("tool_calls"))


def marked(message: Message) -> Message:
    """Return a message with a mark in place of its text, or if it has calls, of a value of their arguments."""
    calls = message.get("tool_calls")
    if not calls:
        return with_text(message, MARK)
    function = calls[-1]["function"]
    arguments, found = _marked_value(function["arguments"])
    changed = {**function, "arguments": arguments} if found else {**function, "name": MARK}
    return {**message, "tool_calls": [*calls[:-1], {**calls[-1], "function": changed}]}


def mark_span(text: str) -> tuple[int, int]:
    """Return where the first mark of a text begins and its last one ends; -1 if there is none."""
    for mark in (MARK, str(MARK_NUMBER)):
        if (first := text.find(mark)) >= 0:
            return first, text.rfind(mark) + len(mark)
    return -1, -1


def _marked_value(value: Any) -> tuple[Any, bool]:
    """Return a value with a mark of the same type in place of its last text or number, and whether it has one."""
    if isinstance(value, str):
        return MARK, True
    if isinstance(value, int | float) and not isinstance(value, bool):
        return MARK_NUMBER, True
    if isinstance(value, Mapping):
        for key in reversed(value):
            inner, found = _marked_value(value[key])
            if found:
                return {**value, key: inner}, True
    if isinstance(value, list):
        for index in reversed(range(len(value))):
            inner, found = _marked_value(value[index])
            if found:
                return [*value[:index], inner, *value[index + 1 :]], True
    return value, False


def _shown(message: Message, text: str) -> bool:
    """Return whether a rendering holds a message. Templates may trim texts, escape them, and drop reasoning."""
    whole = text_of(message)
    answer = whole.rpartition("</think>")[2].strip() or whole.strip()
    answers = [answer] if isinstance(message["content"], str) else texts_of(message)
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    texts = [*answers, *(text for call in calls for text in (call["name"], *call["arguments"].values()))]
    return all(
        wanted in text or json.dumps(wanted, ensure_ascii=False)[1:-1] in text or json.dumps(wanted)[1:-1] in text
        for wanted in texts
        if isinstance(wanted, str)
    )


def _with_json_arguments(call: Mapping[str, Any]) -> Message:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
