"""A row of users' data in, a checked Example out; messages about faults name file, line and field."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from onelayer.compiler.conversations.fields import checked_string, kind_name, parsed
from onelayer.compiler.conversations.messages import checked_messages, checked_tools
from onelayer.compiler.conversations.parts import Given, Message, given_media, placed, placed_in_text
from onelayer.compiler.errors import InputError
from onelayer.compiler.media.sources import Folder, MediaSource
from onelayer.compiler.sources.pairs import with_prompt

FORMS = (
    "'text', 'text' with 'label', 'prompt' with 'completion', 'prompt' with 'chosen' and 'rejected', 'prompt' with "
    "'choices' and 'answer', 'image' or 'audio' with 'label', or 'messages'"
)
# Columns that change what the model sees, and that nothing here renders: without them the text would be another one.
REFUSED_FIELDS = ("chat_template_kwargs",)


@dataclass(frozen=True)
class Example:
    """One example in one form: `text`, `text` and `label`, `prompt` and `completion`, `messages`, or media and `label`.

    A preference has its chosen answer as `completion` and the other as `rejected`, or says whether its `completion` is
    `desirable`.

    `source` is its origin ("file:line"). `prompt` and `completion` are both strings or both message lists. A
    multiple-choice example has its right choice as `completion`, all its `choices`, and the number of the right one as
    `answer`. `label` is the class of the text or the medium, by number or name. `tools` are those that the messages may
    call. `media` are the images and the audio in the order in which the model reads them. A part of a message, or a
    mark (`<image>`) in a prompt that is a string, stands for each. With `text` they stand alone: a transcript.
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
    media: tuple[MediaSource, ...] = ()

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


def example_from_row(row: object, source: str, folder: Folder | None = None) -> Example:
    """Check one row (a mapping of column to value; null counts as absent) and make an example of its form.

    Paths of images and audio lead into `folder`. Columns that belong to no form are ignored, except those that would
    change the text itself, which are refused.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{source}: a row must be an object with {FORMS}, not {kind_name(row)}")
    present = with_prompt({name: value for name, value in row.items() if value is not None}, source)
    for name in REFUSED_FIELDS:
        if present.get(name):
            raise InputError(f"{source}: field '{name}' is not supported; remove it, or render the row into 'text'")
    given = given_media(present, source, folder)
    form = _form(row, present, given, source)
    if present.get("tools") and not isinstance(present.get("messages", present.get("prompt")), list):
        raise InputError(f"{source}: field 'tools' needs 'messages', or 'prompt' and 'completion' of messages")
    return _with_media(_of_form(present, form, source, folder), given)


def _form(row: Mapping[str, Any], present: Mapping[str, Any], given: Given, source: str) -> str:
    """Name the form of a row. Raises `InputError` if it has none, or several."""
    forms = [name for name in ("text", "messages") if name in present]
    is_question = {"prompt", "choices"} <= present.keys() and "completion" not in present
    is_preference = "chosen" in present
    if is_preference:
        forms.append("chosen+rejected")
    if ("prompt" in present and not is_preference) or "completion" in present:
        forms.append("prompt+choices" if is_question else "prompt+completion")
    if not forms and given and "label" in present:
        return "label"
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
    return forms[0]


def _of_form(present: Mapping[str, Any], form: str, source: str, folder: Folder | None) -> Example:
    """Check the fields of one form, and make its example; media are not in their places yet."""
    match form:
        case "text":
            return Example(source, text=checked_string(present["text"], source, "text"), label=_label(present, source))
        case "label":
            return Example(source, label=_label(present, source))
        case "messages":
            messages = checked_messages(parsed(present["messages"]), source, "messages", folder)
            if not any(message["role"] == "assistant" and message.get("weight") != 0 for message in messages):
                raise InputError(
                    f"{source}: field 'messages' has no assistant turn to learn from; add one, or use 'text'"
                )
            return Example(source, messages=messages, tools=checked_tools(present, source))
        case "chosen+rejected":
            chosen = _pair(present, source, folder, "chosen")
            return replace(chosen, rejected=_pair(present, source, folder, "rejected").completion)
        case "prompt+choices":
            return _question(present, source, folder)
    return _pair(present, source, folder)


def _with_media(example: Example, given: Given) -> Example:
    """Place the media of a row where texts show them. Raises `InputError` if they do not fit, or for preferences."""
    source = example.source
    if example.messages is not None:
        messages, media = placed(example.messages, given, source)
        shown = replace(example, messages=messages, media=media)
    elif isinstance(example.prompt, list) and isinstance(example.completion, list):
        messages, media = placed([*example.prompt, *example.completion], given, source)
        count = len(example.prompt)
        shown = replace(example, prompt=messages[:count], completion=messages[count:], media=media)
    elif isinstance(example.prompt, str) and given:
        prompt, media = placed_in_text(example.prompt, given, source)
        shown = replace(example, prompt=prompt, media=media)
    else:
        return replace(example, media=tuple(medium for sources in given.values() for medium in sources))
    if media and example.is_preference:
        raise InputError(f"{source}: preferences with {media[0].kind}s are not supported; remove the {media[0].kind}s")
    return shown


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
        raise InputError(f"{source}: field 'label' must be a whole number or a name, not {kind_name(label)}")
    return label


def _pair(present: Mapping[str, Any], source: str, folder: Folder | None, answer: str = "completion") -> Example:
    """Check a row with `prompt` and the field `answer`: both present, both of the same type."""
    for name, other in (("prompt", answer), (answer, "prompt")):
        if name not in present:
            remedy = "" if name == answer else "; use 'text' for an example without a prompt"
            raise InputError(f"{source}: field '{other}' needs a field '{name}' too{remedy}")
    prompt, completion, label = present["prompt"], present[answer], present.get("label")
    if isinstance(prompt, list) != isinstance(completion, list):
        raise InputError(
            f"{source}: field 'prompt' is {kind_name(prompt)} and '{answer}' is {kind_name(completion)}; "
            "make both strings, or both lists of messages"
        )
    desirable = label if isinstance(label, bool) and answer == "completion" else None
    if not isinstance(prompt, list):
        prompt = checked_string(prompt, source, "prompt", remedy="; use 'text' for an example without a prompt")
        completion = checked_string(completion, source, answer)
        return Example(source, prompt=prompt, completion=completion, desirable=desirable)
    completion = checked_messages(completion, source, answer, folder)
    if completion[0]["role"] != "assistant":
        raise InputError(
            f"{source}: field '{answer}[0].role' is '{completion[0]['role']}'; a completion starts with "
            "an assistant message, move the others to 'prompt'"
        )
    if any(message.get("weight") == 0 for message in completion):
        raise InputError(f"{source}: field '{answer}' has a message of weight 0; weights belong into 'messages'")
    checked, tools = checked_messages(prompt, source, "prompt", folder), checked_tools(present, source)
    return Example(source, prompt=checked, completion=completion, tools=tools, desirable=desirable)


def _question(present: Mapping[str, Any], source: str, folder: Folder | None) -> Example:
    """Check a row with `prompt`, `choices` and `answer`: the number of the right choice from 0, or its text."""
    choices = parsed(present["choices"])
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError(f"{source}: field 'choices' must be a list of two texts or more, not {kind_name(choices)}")
    texts = tuple(checked_string(choice, source, f"choices[{index}]") for index, choice in enumerate(choices))
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
    is_chat = isinstance(prompt, list)
    checked = (
        checked_messages(prompt, source, "prompt", folder) if is_chat else checked_string(prompt, source, "prompt")
    )
    completion = _completed(checked, texts[number])
    return Example(source, prompt=checked, completion=completion, choices=texts, answer=number)


def _completed(prompt: str | list[Message] | None, choice: str) -> str | list[Message]:
    return choice if isinstance(prompt, str) else [{"role": "assistant", "content": choice}]
