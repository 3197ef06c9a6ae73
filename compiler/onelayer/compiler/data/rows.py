"""A row of users' data in, a checked Example out; messages about faults name file, line and field."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from onelayer.compiler.data.pairs import with_prompt
from onelayer.compiler.errors import InputError

Message = dict[str, Any]

FORMS = (
    "'text', 'text' with 'label', 'prompt' with 'completion', 'prompt' with 'chosen' and 'rejected', 'prompt' with "
    "'choices' and 'answer', or 'messages'"
)
# Columns that change what the model sees, and that nothing here renders: without them the text would be another one.
REFUSED_FIELDS = ("images", "image", "videos", "video", "audios", "audio", "chat_template_kwargs")
REFUSED_KEYS = ("function_call", "tools")
ROLES = ("system", "developer", "user", "assistant", "tool")
WRONG_ROLES = {
    **dict.fromkeys(("human", "person", "prompter", "instruction"), "user"),
    **dict.fromkeys(("ai", "bot", "chatgpt", "gpt", "model", "response"), "assistant"),
}


@dataclass(frozen=True)
class Example:
    """One example in exactly one of four forms: `text`; `text` and `label`; `prompt` and `completion`; `messages`.

    A preference has its chosen answer as `completion` and the other as `rejected`, or says whether its `completion` is
    `desirable`.

    `source` is its origin ("file:line"). `prompt` and `completion` are both strings or both message lists. A
    multiple-choice example has its right choice as `completion`, all its `choices`, and the number of the right one as
    `answer`. `label` is the class of the text, by number or name. `tools` are those that the messages may call.
    """

    source: str
    text: str | None = None
    prompt: str | list[Message] | None = None
    completion: str | list[Message] | None = None
    messages: list[Message] | None = None
    choices: tuple[str, ...] | None = None
    answer: int | None = None
    label: int | str | None = None
    tools: list[Any] | None = None
    rejected: str | list[Message] | None = None
    desirable: bool | None = None

    @property
    def is_preference(self) -> bool:
        """Whether the example says which answer is better, or whether its answer is good."""
        return self.rejected is not None or self.desirable is not None

    def with_rejected(self) -> "Example":
        """Return the same prompt, completed by the rejected answer."""
        return replace(self, completion=self.rejected)

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
    present = with_prompt({name: value for name, value in row.items() if value is not None}, source)
    for name in REFUSED_FIELDS:
        if present.get(name):
            raise InputError(
                f"{source}: field '{name}' is not supported, rows hold text only; remove it, or render the row into "
                "'text'"
            )
    forms = [name for name in ("text", "messages") if name in present]
    is_question = {"prompt", "choices"} <= present.keys() and "completion" not in present
    is_preference = "chosen" in present
    if is_preference:
        forms.append("chosen+rejected")
    if ("prompt" in present and not is_preference) or "completion" in present:
        forms.append("prompt+choices" if is_question else "prompt+completion")
    if not forms:
        columns = (
            ", ".join(f"'{name}'{' (null)' if value is None else ''}" for name, value in row.items()) or "no fields"
        )
        raise InputError(
            f"{source}: has {columns}, but needs {FORMS}; rename its fields, or map them: "
            "--columns prompt=question,completion=answer"
        )
    if len(forms) > 1:
        raise InputError(f"{source}: ambiguous, has the forms {' and '.join(forms)}; keep one of {FORMS}")
    if present.get("tools") and not isinstance(present.get("messages", present.get("prompt")), list):
        raise InputError(f"{source}: field 'tools' needs 'messages', or 'prompt' and 'completion' of messages")
    if "text" in present:
        return Example(source, text=_string(present["text"], source, "text"), label=_label(present, source))
    if "messages" in present:
        messages = _messages(_parsed(present["messages"]), source, "messages")
        if not any(message["role"] == "assistant" and message.get("weight") != 0 for message in messages):
            raise InputError(f"{source}: field 'messages' has no assistant turn to learn from; add one, or use 'text'")
        return Example(source, messages=messages, tools=_tools(present, source))
    if is_preference:
        return replace(_pair(present, source, "chosen"), rejected=_pair(present, source, "rejected").completion)
    return _question(present, source) if is_question else _pair(present, source)


def of_one_kind(examples: Iterable[Example]) -> Iterator[Example]:
    """Yield the examples. Raises `InputError` if some have a label, or preferences, and others have none."""
    first = None
    for example in examples:
        first = first or example
        for name, wanted, given in (
            ("label", first.label, example.label),
            ("rejected", first.rejected, example.rejected),
            ("label", first.desirable, example.desirable),
        ):
            if (given is None) != (wanted is None):
                has, had = (f"no '{name}'", "one") if given is None else (f"a '{name}'", "none")
                raise InputError(f"{example.source}: has {has} and {first.source} has {had}; keep them apart")
        yield example


def _label(present: Mapping[str, Any], source: str) -> int | str | None:
    """Return the class of a text, if the row has one; the model knows which classes exist."""
    label = present.get("label")
    if not isinstance(label, int | str | None) or isinstance(label, bool):
        raise InputError(f"{source}: field 'label' must be a whole number or a name, not {_kind(label)}")
    return label


def _pair(present: Mapping[str, Any], source: str, answer: str = "completion") -> Example:
    """Check a row with `prompt` and the field `answer`: both present, both of the same type."""
    for name, other in (("prompt", answer), (answer, "prompt")):
        if name not in present:
            remedy = "" if name == answer else "; use 'text' for an example without a prompt"
            raise InputError(f"{source}: field '{other}' needs a field '{name}' too{remedy}")
    prompt, completion, label = present["prompt"], present[answer], present.get("label")
    if isinstance(prompt, list) != isinstance(completion, list):
        raise InputError(
            f"{source}: field 'prompt' is {_kind(prompt)} and '{answer}' is {_kind(completion)}; "
            "make both strings, or both lists of messages"
        )
    desirable = label if isinstance(label, bool) and answer == "completion" else None
    if not isinstance(prompt, list):
        prompt = _string(prompt, source, "prompt", remedy="; use 'text' for an example without a prompt")
        completion = _string(completion, source, answer)
        return Example(source, prompt=prompt, completion=completion, desirable=desirable)
    completion = _messages(completion, source, answer)
    if completion[0]["role"] != "assistant":
        raise InputError(
            f"{source}: field '{answer}[0].role' is '{completion[0]['role']}'; a completion starts with "
            "an assistant message, move the others to 'prompt'"
        )
    if any(message.get("weight") == 0 for message in completion):
        raise InputError(f"{source}: field '{answer}' has a message of weight 0; weights belong into 'messages'")
    checked, tools = _messages(prompt, source, "prompt"), _tools(present, source)
    return Example(source, prompt=checked, completion=completion, tools=tools, desirable=desirable)


def _question(present: Mapping[str, Any], source: str) -> Example:
    """Check a row with `prompt`, `choices` and `answer`: the number of the right choice from 0, or its text."""
    choices = _parsed(present["choices"])
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError(f"{source}: field 'choices' must be a list of two texts or more, not {_kind(choices)}")
    texts = tuple(_string(choice, source, f"choices[{index}]") for index, choice in enumerate(choices))
    if len(set(texts)) < len(texts):
        raise InputError(f"{source}: field 'choices' holds a text twice; remove one")
    answer = present.get("answer")
    number = texts.index(answer) if isinstance(answer, str) and answer in texts else answer
    if isinstance(number, str) and number.isdecimal():  # tables have no numbers
        number = int(number)
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
                raise InputError(f"{source}: field '{where}.{key}' is not supported; write the call into 'tool_calls'")
        messages.append(_message(message, source, where))
    return messages


def _message(message: Mapping[str, Any], source: str, where: str) -> Message:
    """Check one message: a known role, a text or calls, and a weight of 0 or 1."""
    role = _string(message.get("role"), source, f"{where}.role")
    meant = WRONG_ROLES.get(role.lower()) or next(iter(get_close_matches(role.lower(), ROLES, n=1, cutoff=0.8)), role)
    if meant != role:  # other roles are left to the chat template
        raise InputError(f"{source}: field '{where}.role' is '{role}'; write '{meant}'")
    if message.get("weight") not in (None, 0, 1):
        raise InputError(f"{source}: field '{where}.weight' is {message['weight']!r}; write 0 or 1, or remove it")
    calls = _calls(message.get("tool_calls"), source, f"{where}.tool_calls")
    content = _joined(message.get("content"), source, f"{where}.content")
    if calls and content is None:
        content = ""
    elif not (content == "" and (calls or role == "system")):  # published data sets often have an empty system message
        content = _string(content, source, f"{where}.content")
    # Arrow fills missing keys of rows with null; a chat template would treat them as present.
    others = {key: item for key, item in message.items() if item is not None and key != "tool_calls"}
    return {**others, "role": role, "content": content, **({"tool_calls": calls} if calls else {})}


def _joined(content: object, source: str, where: str) -> object:
    """Return the text of a content that is one part of type text; any other content as it is."""
    if not isinstance(content, list) or not content:
        return content
    kinds = [part.get("type") if isinstance(part, Mapping) else None for part in content]
    if other := next((kind for kind in kinds if kind not in (None, "text")), None):
        raise InputError(f"{source}: field '{where}' has a part of type '{other}', and rows hold text only; remove it")
    if kinds != ["text"]:
        raise InputError(f"{source}: field '{where}' must be a string, not a list; join its parts")
    return content[0].get("text")


def _calls(value: object, source: str, field: str) -> list[dict[str, Any]]:
    """Check the calls of a message, and bring each into one form: a `function` with a name and an arguments object."""
    calls = []
    for index, call in enumerate(value if isinstance(value, list) else []):
        function = call.get("function") or call if isinstance(call, Mapping) else {}
        name, arguments = function.get("name"), _parsed(function.get("arguments") or {})
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise InputError(
                f"{source}: field '{field}[{index}]' must be an object whose 'function' has a 'name' and 'arguments'"
            )
        others = {key: item for key, item in call.items() if item is not None and key not in ("name", "arguments")}
        calls.append({"type": "function", **others, "function": {"name": name, "arguments": dict(arguments)}})
    return calls


def _tools(present: Mapping[str, Any], source: str) -> list[Any] | None:
    """Return the tools of a row: a list of JSON schemas, or its JSON text; None if there are none."""
    tools = _parsed(present.get("tools") or None)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise InputError(f"{source}: field 'tools' must be a list of JSON schemas of functions, not {_kind(tools)}")
    return tools or None


def _parsed(value: object) -> object:
    """Return what a JSON text holds, and anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


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
