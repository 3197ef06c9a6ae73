"""An example and a tokenizer in, token ids and labels out. Only this file decides what the loss counts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onelayer.compiler.conversations.chat import Chat
from onelayer.compiler.conversations.turns import Span, Turns
from onelayer.compiler.data.rows import Example
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.files import check_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


IGNORED = -100  # the label that torch's cross-entropy and every transformers loss ignore
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "spiece*", "*.model")
GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Tokens:
    """Token ids and labels of equal length: a label is the id if the loss counts it, else -100. Not shifted.

    `positions` is each token's index in its own row, if several rows are packed into this one. `label` is the number
    of the class of the whole text, if the model predicts classes. `cut`: the row was longer than allowed.
    """

    input_ids: list[int]
    labels: list[int]
    positions: list[int] | None = None
    label: int | None = None
    cut: bool = field(default=False, compare=False)

    @property
    def labeled(self) -> int:
        """The number of predictions that the loss counts.

        These are all labeled tokens except the first, which nothing predicts; a text with a class counts as one.
        """
        if self.label is not None:
            return 1
        return sum(label != IGNORED for label in self.labels[1:])


def asked_and_answered(tokens: Tokens) -> tuple[list[int], list[int]]:
    """Return what an encoder-decoder reads of a row, and what it predicts.

    It reads the tokens without a label, or all of a plain text, and predicts those with one.
    """
    asked = [token for token, label in zip(tokens.input_ids, tokens.labels, strict=True) if label == IGNORED]
    return asked or tokens.input_ids, [label for label in tokens.labels if label != IGNORED]


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


def tokenize(
    example: Example, tokenizer: "PreTrainedTokenizerBase", max_length: int, append_eos: bool = False
) -> Tokens:
    """Tokenize one example to ids and labels, truncated at `max_length` tokens.

    Labeled are: all tokens of a `text`, the completion of `prompt` and `completion`, the assistant turns of `messages`.
    `append_eos` adds an end token to texts and completions without one; a chat template writes its own end of turn.
    """
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
        tokens, append_eos = _chat_tokens(example, tokenizer), False
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


def _chat_tokens(example: Example, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """Tokenize a conversation by the tokenizer's chat template; the assistant's turns are labeled.

    A turn of `weight` 0 is not. Labels come from the template's own `{% generation %}` marks, if it has them. A
    completion runs to the end of the text.
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
            return _spanned(chat, [(Turns(chat).start(len(example.prompt)), len(chat.text))])
    chat = Chat(example.source, example.messages, tokenizer, example.tools)
    with chat.limited():
        return _turn_tokens(chat.checked())


def _turn_tokens(chat: Chat) -> Tokens:
    """Label the assistant's turns of a conversation, those of weight 0 excepted."""
    tokenizer = chat.tokenizer
    answers = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    learned = [index for index in answers if chat.messages[index].get("weight") != 0]
    marked = tokenizer.is_fast and GENERATION_MARK.search(tokenizer.get_chat_template(tools=chat.tools))
    if marked and learned == answers:
        return _marked(chat)
    turns = Turns(chat)
    tokens = _spanned(chat, [turns.span(turn) for turn in learned])
    if not marked:
        return tokens
    pairs = zip(_marked(chat).labels, tokens.labels, strict=True)
    return Tokens(tokens.input_ids, [label if own != IGNORED else IGNORED for own, label in pairs])


def _marked(chat: Chat) -> Tokens:
    """Take the labels from the template's own `{% generation %}` marks."""
    with chat.faults():
        encoded: Any = chat.tokenizer.apply_chat_template(
            chat.prepared, return_dict=True, return_assistant_tokens_mask=True, **chat.arguments
        )
    ids, mask = list(encoded["input_ids"]), encoded["assistant_masks"]
    return Tokens(ids, [token if marked else IGNORED for token, marked in zip(ids, mask, strict=True)])


def _spanned(chat: Chat, spans: Sequence[Span]) -> Tokens:
    """Label the tokens that begin in the given characters of a conversation's rendering."""
    if not chat.tokenizer.is_fast:
        return _piecewise(chat.text, spans, chat.tokenizer)
    encoded = chat.tokenizer(chat.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    places = [_first_character(chat.text, offset) for offset in offsets]
    inside = [any(first <= place < last for first, last in spans) for place in places]
    return Tokens(ids, [token if labeled else IGNORED for token, labeled in zip(ids, inside, strict=True)])


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
