"""An example and a tokenizer in, token ids and labels out. Only this file decides what the loss counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Union, runtime_checkable

from onelayer.compiler.conversations.chat import Chat, Span
from onelayer.compiler.conversations.turns import completion_span, learned_spans
from onelayer.compiler.data.rows import Example
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.files import check_directory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


IGNORED = -100  # the label that torch's cross-entropy and every transformers loss ignore
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "spiece*", "*.model")


class RowInputs(Protocol):
    """The arguments of a model for one row that are not its token ids, each with a leading dimension.

    `shapes` are those of the tensors by name; `digest` is of all that decides their values, None if the ids do.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes by the names of the arguments."""

    @property
    def digest(self) -> str | None:
        """The digest of what the tensors are made of."""

    def tensors(self) -> "dict[str, torch.Tensor]":
        """Make the tensors, which nothing keeps."""


@dataclass(frozen=True)
class Tokens:
    """Token ids and labels of equal length: a label is the id if the loss counts it, else -100. Not shifted.

    `positions` is each token's index in its own row, if several rows are packed into this one. `label` is the number
    of the class of the whole text, if the model predicts classes. `inputs` makes what the model reads in addition to
    the ids: pixels of images, features of audio. `transcript`: all ids are written, and none is read. `cut`: the row
    was longer than allowed.
    """

    input_ids: list[int]
    labels: list[int]
    positions: list[int] | None = None
    label: int | None = None
    inputs: RowInputs | None = field(default=None, compare=False)
    transcript: bool = False
    cut: bool = field(default=False, compare=False)

    @property
    def labeled(self) -> int:
        """The number of predictions that the loss counts.

        These are all labeled tokens except the first, which nothing predicts; a text with a class counts as one.
        """
        if self.label is not None:
            return 1
        return sum(label != IGNORED for label in self.labels[1:])


@runtime_checkable
class RowReader(Protocol):
    """What tokenizes the rows of a model that reads more than text; `tokenizer` is that of its texts."""

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """The tokenizer of texts; None if the model reads none."""

    def tokens_of(self, example: Example, max_length: int, append_eos: bool) -> Tokens:
        """Tokenize one example."""


AnyTokenizer = Union["PreTrainedTokenizerBase", RowReader]  # a name in quotes takes no `|`


def text_tokenizer(reader: AnyTokenizer) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a model's texts. Raises `InputError` if it reads none."""
    if not isinstance(reader, RowReader):
        return reader
    if reader.tokenizer is None:
        raise InputError(f"{reader}: the model reads no text, so it has no tokenizer; give a language model")
    return reader.tokenizer


def asked_and_answered(tokens: Tokens) -> tuple[list[int], list[int]]:
    """Return what an encoder-decoder reads of a row, and what it predicts.

    It reads the tokens without a label, or all of a plain text, and predicts those with one. It reads none of a
    transcript, whose medium it hears or sees.
    """
    asked = [token for token, label in zip(tokens.input_ids, tokens.labels, strict=True) if label == IGNORED]
    alone = [] if tokens.transcript else tokens.input_ids
    return asked or alone, [label for label in tokens.labels if label != IGNORED]


def load_tokenizer(model_directory: str | Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model directory, without the network and without running code from the directory."""
    from transformers import AutoTokenizer

    directory = Path(model_directory)
    check_directory(directory, "name a model's directory")
    remedy = "copy the model's tokenizer files (tokenizer.json, tokenizer_config.json) there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        # transformers builds an empty tokenizer if only tokenizer_config.json is left: every text would become empty.
        empty = not tokenizer("a", add_special_tokens=False)["input_ids"]
    except Exception as error:  # the Rust tokenizers raise bare Exception for a damaged file
        if not any(fnmatch(file.name, pattern) for file in directory.iterdir() for pattern in TOKENIZER_FILES):
            raise InputError(f"{directory}: holds no tokenizer; {remedy}") from None
        raise InputError(f"{directory}: no tokenizer that can be loaded ({_first_line(error)}); {remedy}") from None
    if empty:
        raise InputError(f"{directory}: the tokenizer has no vocabulary; {remedy}")
    return tokenizer


def tokenize(example: Example, tokenizer: AnyTokenizer, max_length: int, append_eos: bool = False) -> Tokens:
    """Tokenize one example to ids and labels, truncated at `max_length` tokens.

    Labeled are: all tokens of a `text`, the completion of `prompt` and `completion`, the assistant turns of `messages`.
    `append_eos` adds an end token to texts and completions without one; a chat template writes its own end of turn.
    """
    if isinstance(tokenizer, RowReader):
        return tokenizer.tokens_of(example, max_length, append_eos)
    if example.media:
        raise InputError(
            f"{example.source}: has {len(example.media)} {example.media[0].kind}(s), and the model of "
            f"{_name(tokenizer)} reads text only; give a model that reads them, or remove them from the row"
        )
    if example.text is not None:
        ids = _ids(tokenizer, example.text)
        tokens = Tokens(ids, list(ids))
    elif isinstance(example.prompt, str):
        assert isinstance(example.completion, str)
        tokens = _pair_tokens(example.prompt, example.completion, tokenizer)
    else:
        tokens, append_eos = _spanned(*conversation(example, tokenizer), tokenizer), False
    if append_eos:
        tokens = _with_eos(tokens, tokenizer)
    ids = tokens.input_ids
    return Tokens(ids[:max_length], tokens.labels[:max_length], cut=len(ids) > max_length)


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
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)  # the boundary is in a token
    offsets = encoded["offset_mapping"][not_doubled(tokenizer, encoded["input_ids"])]
    inside = [index for index, offset in enumerate(offsets) if _first_character(text, offset) >= len(prompt)]
    return _labeled_from(ids, inside[0] if inside else len(ids))


def conversation(example: Example, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, list[Span]]:
    """Render a conversation by the tokenizer's chat template; return its text, and the characters that are labeled.

    Labeled are the assistant's turns, those of `weight` 0 excepted. A completion runs to the end of the text.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"{example.source}: messages need a chat template and {_name(tokenizer)} has none; add "
            "chat_template.jinja next to its tokenizer, or write 'text' or 'prompt' and 'completion' as strings"
        )
    if example.messages is None:
        assert isinstance(example.prompt, list)
        assert isinstance(example.completion, list)
        chat = Chat(example.source, [*example.prompt, *example.completion], tokenizer, example.tools)
        with chat.limited():
            chat = chat.checked()
            return chat.text, [completion_span(chat, len(example.prompt))]
    chat = Chat(example.source, example.messages, tokenizer, example.tools)
    with chat.limited():
        chat = chat.checked()
        return chat.text, learned_spans(chat)


def _spanned(text: str, spans: Sequence[Span], tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """Label the tokens that begin in the given characters of a text."""
    if not tokenizer.is_fast:
        return _piecewise(text, spans, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    return Tokens(ids, labels_within(text, spans, ids, encoded["offset_mapping"]))


def labels_within(text: str, spans: Sequence[Span], ids: Sequence[int], offsets: Sequence[Span]) -> list[int]:
    """Return the labels of tokens at `offsets` of a text: those that begin in one of the spans are labeled."""
    places = [_first_character(text, offset) for offset in offsets]
    inside = [any(first <= place < last for first, last in spans) for place in places]
    return [token if labeled else IGNORED for token, labeled in zip(ids, inside, strict=True)]


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
    ids = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    return ids[not_doubled(tokenizer, ids)] if special else ids


def not_doubled(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> slice:
    """Return which ids of a text to keep: it may hold the special tokens itself that the tokenizer puts around it."""
    bare, framed = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    places = (place for place in range(len(framed)) if framed[place : place + len(bare)] == bare)
    if (start := next(places, None)) is None:
        return slice(None)
    opening, closing = framed[:start], framed[start + len(bare) :]
    first, last = len(opening), len(ids) - len(closing)
    return slice(
        first if opening and list(ids[first : 2 * first]) == opening else 0,
        last if closing and list(ids[last - len(closing) : last]) == closing else len(ids),
    )


def _name(tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(tokenizer.name_or_path or "this tokenizer")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
