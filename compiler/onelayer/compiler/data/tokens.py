"""An example and a tokenizer in, token ids and labels out. Only this file decides what the loss counts."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onelayer.compiler.data.rows import Example, Message
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.time_limit import TimeLimitError, time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


IGNORED = -100  # the label that torch's cross-entropy and every transformers loss ignore
GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
TEMPLATE_SECONDS = 10.0  # a thousand times what a template takes for a long conversation
Span = tuple[int, int]  # characters [start, end) of a text


@dataclass(frozen=True)
class Tokens:
    """Token ids and labels of equal length: a label is the id if the loss counts it, else -100. Not shifted.

    `positions` is each token's index in its own row, if several rows are packed into this one. `label` is the number
    of the class of the whole text, if the model predicts classes.
    """

    input_ids: list[int]
    labels: list[int]
    positions: list[int] | None = None
    label: int | None = None

    @property
    def labeled(self) -> int:
        """The number of predictions that the loss counts.

        These are all labeled tokens except the first, which nothing predicts; a text with a class counts as one.
        """
        if self.label is not None:
            return 1
        return sum(label != IGNORED for label in self.labels[1:])


def load_tokenizer(model_directory: str | Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model directory, without the network and without running code from the directory."""
    from transformers import AutoTokenizer

    directory = Path(model_directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; name a model's directory")
    remedy = "copy the model's tokenizer files (tokenizer.json, tokenizer_config.json) there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        # transformers builds an empty tokenizer if only tokenizer_config.json is left: every text would become empty.
        empty = not tokenizer("a", add_special_tokens=False)["input_ids"]
    except Exception as error:  # the Rust tokenizers raise bare Exception for a damaged file
        raise InputError(f"{directory}: no tokenizer that can be loaded ({_first_line(error)}); {remedy}") from None
    if empty:
        raise InputError(f"{directory}: the tokenizer has no vocabulary; {remedy}")
    return tokenizer


def tokenize(
    example: Example, tokenizer: "PreTrainedTokenizerBase", max_length: int, append_eos: bool = False
) -> Tokens:
    """Tokenize one example to ids and labels, truncated at `max_length` tokens.

    Labeled are: all tokens of a `text`, the completion of `prompt` and `completion`, the assistant turns of `messages`.
    `append_eos` adds an end token to texts and completions without one; a chat template writes its own end of turn.
    """
    if example.text is not None:
        ids = _ids(tokenizer, example.text)
        tokens = Tokens(ids, list(ids))
    elif isinstance(example.prompt, str):
        assert isinstance(example.completion, str)
        tokens = _pair_tokens(example.prompt, example.completion, tokenizer)
    else:
        tokens, append_eos = _chat_tokens(example, tokenizer), False
    if append_eos:
        tokens = _with_eos(tokens, tokenizer)
    return Tokens(tokens.input_ids[:max_length], tokens.labels[:max_length])


def _with_eos(tokens: Tokens, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise InputError(f"{_name(tokenizer)}: the tokenizer has no eos_token; set it in tokenizer_config.json")
    if tokens.input_ids[-1:] == [eos]:
        return tokens
    return Tokens([*tokens.input_ids, eos], [*tokens.labels, eos])


def _pair_tokens(prompt: str, completion: str, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """Tokenize prompt and completion as one string; the labels start where the completion starts."""
    text = prompt + completion
    ids, prompt_ids = _ids(tokenizer, text), _ids(tokenizer, prompt)
    closing = [token for token in ids[-1:] if token == tokenizer.eos_token_id]  # what some tokenizers end a text with
    if ids[: len(prompt_ids)] == prompt_ids:
        return _labeled_from(ids, len(prompt_ids))
    if closing and prompt_ids[-1:] == closing:
        prompt_ids = prompt_ids[:-1]
        if ids[: len(prompt_ids)] == prompt_ids:
            return _labeled_from(ids, len(prompt_ids))
    if not tokenizer.is_fast:
        ids = [*prompt_ids, *_ids(tokenizer, completion, special=False), *closing]
        return _labeled_from(ids, len(prompt_ids))
    offsets = tokenizer(text, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]  # the boundary is in a token
    inside = [index for index, offset in enumerate(offsets) if _first_character(text, offset) >= len(prompt)]
    return _labeled_from(ids, inside[0] if inside else len(ids))


def _chat_tokens(example: Example, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """Tokenize a conversation by the tokenizer's chat template; the assistant's turns are labeled."""
    if not tokenizer.chat_template:
        raise InputError(
            f"{example.source}: messages need a chat template and {_name(tokenizer)} has none; add "
            "chat_template.jinja next to its tokenizer, or write 'text' or 'prompt' and 'completion' as strings"
        )
    if example.messages is None:
        assert isinstance(example.prompt, list)
        assert isinstance(example.completion, list)
        return _rendered(example, [*example.prompt, *example.completion], [len(example.prompt)], tokenizer)
    if tokenizer.is_fast and GENERATION_MARK.search(tokenizer.get_chat_template()):
        return _marked(example, example.messages, tokenizer)
    turns = [index for index, message in enumerate(example.messages) if message["role"] == "assistant"]
    return _rendered(example, example.messages, turns, tokenizer)


def _marked(example: Example, messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """Take the labels from the template's own `{% generation %}` marks."""
    with _template_faults(example, tokenizer):
        encoded: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = list(encoded["input_ids"]), encoded["assistant_masks"]
    return Tokens(ids, [token if marked else IGNORED for token, marked in zip(ids, mask, strict=True)])


def _rendered(
    example: Example, messages: list[Message], turns: Sequence[int], tokenizer: "PreTrainedTokenizerBase"
) -> Tokens:
    """Label the given turns, located by rendering the conversation up to each of them.

    For a prompt and completion, the one given turn runs to the end. Each rendering must continue the previous one;
    templates that rewrite earlier turns are refused.
    """
    whole = _render(example, messages, tokenizer)
    spans: list[Span] = []
    for turn in turns:
        before = _render(example, messages[:turn], tokenizer, prompt=True)
        after = whole if example.messages is None else _render(example, messages[: turn + 1], tokenizer)
        if not (after.startswith(before) and whole.startswith(after)):
            raise InputError(
                f"{example.source}: the chat template of {_name(tokenizer)} writes message {turn} in another way "
                "when others follow, so its tokens cannot be identified; put {% generation %} marks into the template, "
                "or write 'prompt' and 'completion' as strings"
            )
        spans.append((len(before), len(after)))
    if not tokenizer.is_fast:
        return _piecewise(whole, spans, tokenizer)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    inside = [any(first <= _first_character(whole, offset) < last for first, last in spans) for offset in offsets]
    return Tokens(ids, [token if labeled else IGNORED for token, labeled in zip(ids, inside, strict=True)])


def _render(
    example: Example, messages: list[Message], tokenizer: "PreTrainedTokenizerBase", prompt: bool = False
) -> str:
    with _template_faults(example, tokenizer):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert isinstance(text, str)
    return text


@contextmanager
def _template_faults(example: Example, tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """Turn what a chat template raises (roles that must alternate, unknown keys) into an `InputError`."""
    from jinja2 import TemplateError

    try:
        with time_limit(TEMPLATE_SECONDS):
            yield
    except TimeLimitError:
        raise InputError(
            f"{example.source}: the chat template of {_name(tokenizer)} takes more than {TEMPLATE_SECONDS:.0f} s for "
            "these messages; give a model with another template"
        ) from None
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"{example.source}: the chat template of {_name(tokenizer)} refuses the messages "
            f"({_first_line(error)}); change their roles, or write 'text'"
        ) from None


def _piecewise(text: str, spans: Sequence[Span], tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """Tokenize the text inside and outside the spans piece by piece, for tokenizers without offsets."""
    ids: list[int] = []
    labels: list[int] = []
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    for index, (start, end) in enumerate(pairwise(edges)):
        piece = _ids(tokenizer, text[start:end], special=False)
        ids += piece
        labels += piece if index % 2 else [IGNORED] * len(piece)  # spans and gaps alternate, a gap first
    return Tokens(ids, labels)


def _first_character(text: str, offset: Span) -> int:
    """Return where a token's own text starts, without blanks; -1 for a token without text.

    Some tokenizers join the blank before a word to the word, and only some of them report it. A prompt that ends in a
    blank must not cost the completion its first word.
    """
    piece = text[slice(*offset)]
    return offset[0] + len(piece) - len(piece.lstrip() or piece) if piece else -1


def _labeled_from(ids: list[int], boundary: int) -> Tokens:
    return Tokens(ids, [IGNORED] * boundary + ids[boundary:])


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str, special: bool = True) -> list[int]:
    """Return the tokenizer's own ids of a text. `verbose=False`: `tokenize` truncates texts that are too long."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _name(tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(tokenizer.name_or_path or "this tokenizer")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
