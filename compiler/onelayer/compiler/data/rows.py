"""A row of users' data in, a checked Example out; messages about faults name file, line and field."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from onelayer.compiler.errors import InputError

Message = dict[str, Any]

FORMS = "'text', 'text' with 'label', 'prompt' with 'completion', 'prompt' with 'choices' and 'answer', or 'messages'"
# Columns that change what the model sees, and that nothing here renders: without them the text would be another one.
REFUSED_FIELDS = ("tools", "images", "image", "chat_template_kwargs")
REFUSED_KEYS = ("tool_calls", "function_call", "tools")


@dataclass(frozen=True)
class Example:
    """One example in exactly one of four forms: `text`; `text` and `label`; `prompt` and `completion`; `messages`.

    `source` is its origin ("file:line"). `prompt` and `completion` are both strings or both message lists. A
    multiple-choice example has its right choice as `completion`, all its `choices`, and the number of the right one as
    `answer`. `label` is the class of the text, by number or name.
    """

    source: str
    text: str | None = None
    prompt: str | list[Message] | None = None
    completion: str | list[Message] | None = None
    messages: list[Message] | None = None
    choices: tuple[str, ...] | None = None
    answer: int | None = None
    label: int | str | None = None

    def with_choice(self, number: int) -> "Example":
        """Return the same prompt, completed by one of its choices."""
        assert self.choices is not None
        return replace(self, completion=_completed(self.prompt, self.choices[number]))


def example_from_row(row: object, source: str) -> Example:
    """Check one row (a mapping of column to value; null counts as absent) and make an example of its form.

    Columns that belong to no form are ignored, except those that would change the text itself, which are refused.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{source}: a row must be an object with {FORMS}, not {_kind(row)}")
    present = {name: value for name, value in row.items() if value is not None}
    for name in REFUSED_FIELDS:
        if present.get(name):
            raise InputError(f"{source}: field '{name}' is not supported; remove it, or render the row into 'text'")
    forms = [name for name in ("text", "messages") if name in present]
    is_question = {"prompt", "choices"} <= present.keys() and "completion" not in present
    if "prompt" in present or "completion" in present:
        forms.append("prompt+choices" if is_question else "prompt+completion")
    if not forms:
        columns = (
            ", ".join(f"'{name}'{' (null)' if value is None else ''}" for name, value in row.items()) or "no fields"
        )
        raise InputError(f"{source}: has {columns}, but needs {FORMS}; rename its fields")
    if len(forms) > 1:
        raise InputError(f"{source}: ambiguous, has the forms {' and '.join(forms)}; keep one of {FORMS}")
    if "text" in present:
        return Example(source, text=_string(present["text"], source, "text"), label=_label(present, source))
    if "messages" in present:
        messages = _messages(present["messages"], source, "messages")
        if not any(message["role"] == "assistant" for message in messages):
            raise InputError(f"{source}: field 'messages' has no assistant turn to learn from; add one, or use 'text'")
        return Example(source, messages=messages)
    return _question(present, source) if is_question else _pair(present, source)


def of_one_kind(examples: Iterable[Example]) -> Iterator[Example]:
    """Yield the examples. Raises `InputError` if some have a label and others have none."""
    first = None
    for example in examples:
        first = first or example
        if (example.label is None) != (first.label is None):
            has, had = ("no 'label'", "one") if example.label is None else ("a 'label'", "none")
            raise InputError(f"{example.source}: has {has} and {first.source} has {had}; keep them apart")
        yield example


def _label(present: Mapping[str, Any], source: str) -> int | str | None:
    """Return the class of a text, if the row has one; the model knows which classes exist."""
    label = present.get("label")
    if not isinstance(label, int | str | None) or isinstance(label, bool):
        raise InputError(f"{source}: field 'label' must be a whole number or a name, not {_kind(label)}")
    return label


def _pair(present: Mapping[str, Any], source: str) -> Example:
    """Check a row with `prompt` and `completion`: both present, both of the same type."""
    for name, other in (("prompt", "completion"), ("completion", "prompt")):
        if name not in present:
            remedy = "" if name == "completion" else "; use 'text' for an example without a prompt"
            raise InputError(f"{source}: field '{other}' needs a field '{name}' too{remedy}")
    prompt, completion = present["prompt"], present["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise InputError(
            f"{source}: field 'prompt' is {_kind(prompt)} and 'completion' is {_kind(completion)}; "
            "make both strings, or both lists of messages"
        )
    if not isinstance(prompt, list):
        prompt = _string(prompt, source, "prompt", remedy="; use 'text' for an example without a prompt")
        return Example(source, prompt=prompt, completion=_string(completion, source, "completion"))
    completion = _messages(completion, source, "completion")
    if completion[0]["role"] != "assistant":
        raise InputError(
            f"{source}: field 'completion[0].role' is '{completion[0]['role']}'; a completion starts with "
            "an assistant message, move the others to 'prompt'"
        )
    return Example(source, prompt=_messages(prompt, source, "prompt"), completion=completion)


def _question(present: Mapping[str, Any], source: str) -> Example:
    """Check a row with `prompt`, `choices` and `answer`: the number of the right choice from 0, or its text."""
    choices = present["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError(f"{source}: field 'choices' must be a list of two texts or more, not {_kind(choices)}")
    texts = tuple(_string(choice, source, f"choices[{index}]") for index, choice in enumerate(choices))
    if len(set(texts)) < len(texts):
        raise InputError(f"{source}: field 'choices' holds a text twice; remove one")
    answer = present.get("answer")
    number = texts.index(answer) if isinstance(answer, str) and answer in texts else answer
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(texts):
        raise InputError(
            f"{source}: field 'answer' is {answer!r}; write the number of the right choice, counted from 0, or its text"
        )
    prompt = present["prompt"]
    checked = _messages(prompt, source, "prompt") if isinstance(prompt, list) else _string(prompt, source, "prompt")
    completion = _completed(checked, texts[number])
    return Example(source, prompt=checked, completion=completion, choices=texts, answer=number)


def _completed(prompt: str | list[Message] | None, choice: str) -> str | list[Message]:
    return choice if isinstance(prompt, str) else [{"role": "assistant", "content": choice}]


def _messages(value: object, source: str, field: str) -> list[Message]:
    """Check a non-empty list of messages, each with a role and a text; other keys stay for the chat template."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{source}: field '{field}' must be a non-empty list of messages, not {_kind(value)}")
    messages: list[Message] = []
    for index, message in enumerate(value):
        where = f"{field}[{index}]"
        if not isinstance(message, Mapping):
            raise InputError(
                f"{source}: field '{where}' must be an object with 'role' and 'content', not {_kind(message)}"
            )
        for key in REFUSED_KEYS:
            if message.get(key):
                raise InputError(f"{source}: field '{where}.{key}' is not supported; write the call into 'content'")
        role = _string(message.get("role"), source, f"{where}.role")
        content = message.get("content")
        if not (role == "system" and content == ""):  # published data sets often have an empty system message
            content = _string(content, source, f"{where}.content")
        # Arrow fills missing keys of rows with null; a chat template would treat them as present.
        others = {key: item for key, item in message.items() if item is not None}
        messages.append({**others, "role": role, "content": content})
    return messages


def _string(value: object, source: str, field: str, remedy: str = "; remove the row or fill it in") -> str:
    """Check a string: not blank, and encodable in UTF-8."""
    if not isinstance(value, str):
        raise InputError(f"{source}: field '{field}' must be a string, not {_kind(value)}")
    if not value.strip():
        raise InputError(f"{source}: field '{field}' is empty{remedy}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{source}: field '{field}' holds half a surrogate pair at character {error.start}; remove it"
        ) from None
    return value


def _kind(value: object) -> str:
    """Name the value's type in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
