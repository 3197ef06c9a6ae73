"""Rows with images or audio and a model's processor in, tokens out whose other inputs are made when a batch is taken.

The text is rendered with one placeholder for each medium. The processor expands the placeholders, by the size of an
image or the length of a recording, and says where; by that the labeled characters move. Nothing here knows a family.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onelayer.compiler.conversations.chat import Span
from onelayer.compiler.data.classes import is_transcriber, refuse_ctc
from onelayer.compiler.data.row_inputs import (
    TEXT_OUTPUTS,
    Made,
    Zeros,
    check_kinds,
    first_row,
    kept_tensors,
    media_names,
    medium_alone,
    processed,
)
from onelayer.compiler.data.rows import Example
from onelayer.compiler.data.tokens import (
    AnyTokenizer,
    Tokens,
    conversation,
    labels_within,
    load_tokenizer,
    tokenize,
)
from onelayer.compiler.data.transcripts import TranscriptReader
from onelayer.compiler.errors import InputError
from onelayer.compiler.media.processors import RowProcessor, load_processor
from onelayer.compiler.media.sources import MediaKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFIX_ARGUMENT = "suffix"  # of processors whose models see their whole prompt at once


def load_reader(
    directory: Path, model_class: "type[PreTrainedModel]", max_image_pixels: int | None = None
) -> AnyTokenizer:
    """Load what tokenizes the rows of a model: its tokenizer, with its processor if it reads more than text.

    A chat template of the processor takes the place of the tokenizer's. Raises `InputError` if one cannot be loaded,
    and for models whose rows nothing here can read.
    """
    refuse_ctc(model_class, directory)
    processor = load_processor(directory, model_class, max_image_pixels)
    if is_transcriber(model_class):
        return TranscriptReader.open(directory, processor)
    if processor is None:
        return load_tokenizer(directory)
    if processor.tokenizer is not None and getattr(processor.stock, "chat_template", None):
        processor.tokenizer.chat_template = processor.stock.chat_template
    return MediaReader(processor)


@dataclass(frozen=True)
class MediaReader:
    """What tokenizes rows of text, images and audio by a model's processor."""

    processor: RowProcessor

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """The tokenizer of texts; None if the model reads none."""
        return self.processor.tokenizer

    @property
    def name_or_path(self) -> str:
        """The name of the model in messages."""
        return str(self.processor.directory)

    def tokens_of(self, example: Example, max_length: int, append_eos: bool) -> Tokens:
        """Tokenize one example; media are never labeled. Raises `InputError` for a row that the model cannot read."""
        check_kinds(example, self.processor, ("text", *self.processor.reads))
        if self.tokenizer is None:
            return self._with_class(example)
        if self._takes_prefix:
            return self._prefixed(example, max_length)
        if not example.media:
            return self._of_text(example, max_length, append_eos)
        if example.text is not None:
            raise InputError(
                f"{example.source}: has 'text' with an {example.media[0].kind}; write 'messages', or 'prompt' and "
                "'completion', which say where it belongs and what to learn"
            )
        if isinstance(example.prompt, str):
            text, spans = self._plain(example, append_eos)
        else:
            text, spans = conversation(example, self.processor.text_tokenizer)
        return self._expanded(example, text, spans, max_length)

    def _with_class(self, example: Example) -> Tokens:
        """Return a row of one medium and no text, for a model that predicts its class; the class is set later.

        Raises `InputError` for rows with a text, or with another number of media.
        """
        texts = (example.text, example.prompt, example.messages)
        if len(example.media) != 1 or any(text is not None for text in texts):
            kind = self.processor.reads[0]
            raise InputError(
                f"{example.source}: the model reads one {kind} and no text; write rows of '{kind}', 'label'"
            )
        return Tokens([], [], label=0, inputs=medium_alone(self.processor, example))

    @cached_property
    def _takes_prefix(self) -> bool:
        return PREFIX_ARGUMENT in inspect.signature(type(self.processor.stock).__call__).parameters

    def _of_text(self, example: Example, max_length: int, append_eos: bool) -> Tokens:
        """Tokenize a row without media; it gets the zeros that the processor gives tokens of texts."""
        tokens = tokenize(example, self.processor.text_tokenizer, max_length, append_eos)
        self._check_marks(example, "".join(self.processor.text_tokenizer.convert_ids_to_tokens(tokens.input_ids)))
        length = len(tokens.input_ids)
        zeros = Zeros(dict.fromkeys(self._token_inputs, (1, length)))
        return Tokens(tokens.input_ids, tokens.labels, inputs=zeros if zeros.shapes else None, cut=tokens.cut)

    @cached_property
    def _token_inputs(self) -> Sequence[str]:
        """The names of what the processor makes for each token, besides its id."""
        output, _ = processed(self.processor, [], {"text": ["a"]})
        return sorted(set(output) - set(TEXT_OUTPUTS))

    def _plain(self, example: Example, append_eos: bool) -> tuple[str, list[Span]]:
        """Return the text of a prompt and completion that are strings, with the processor's own placeholders."""
        tokenizer, prompt = self.processor.text_tokenizer, example.prompt
        assert isinstance(prompt, str)
        assert isinstance(example.completion, str)
        for kind in {source.kind for source in example.media}:
            if kind not in self._marks:
                raise InputError(f"{example.source}: this model has no mark for an {kind} in a text; write 'messages'")
            prompt = prompt.replace(f"<{kind}>", self._marks[kind])
        framed, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
        opening = "".join(tokenizer.convert_ids_to_tokens(framed[: framed.index(bare[0])])) if bare else ""
        start = prompt if prompt.startswith(opening) else opening + prompt
        end = tokenizer.eos_token if append_eos and not example.completion.endswith(str(tokenizer.eos_token)) else ""
        text = start + example.completion + (end or "")
        return text, [(len(start), len(text))]

    def _expanded(self, example: Example, text: str, spans: Sequence[Span], max_length: int) -> Tokens:
        """Tokenize a text with one placeholder for each medium of its row."""
        self._check_marks(example, text)
        arguments = {"text": [text], "add_special_tokens": False}
        asked = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        output, digests = processed(self.processor, [example.media], {**arguments, **asked})
        moved = (output.get("text_replacement_offsets") or [[]])[0]
        expanded = _with_replacements(text, moved)
        ids, offsets = first_row(output["input_ids"]), first_row(output["offset_mapping"])
        shifted = [(_moved(first, moved), _moved(last, moved)) for first, last in spans]
        labels = labels_within(expanded, shifted, ids, [tuple(offset) for offset in offsets])
        ends = [item["new_span"][1] for item in moved]
        ends += [at + len(mark) for mark in self._marks.values() if (at := expanded.rfind(mark)) >= 0]
        last = max((place for place, offset in enumerate(offsets) if offset[0] < max(ends, default=0)), default=-1)
        return self._cut(example, ids, labels, last, max_length, (output, arguments, digests))

    @cached_property
    def _marks(self) -> Mapping[MediaKind, str]:
        """The processor's own placeholders in texts, by kind."""
        found = {kind: getattr(self.processor.stock, f"{kind}_token", None) for kind in self.processor.reads}
        return {kind: mark for kind, mark in found.items() if isinstance(mark, str)}

    def _check_marks(self, example: Example, text: str) -> None:
        """Raise `InputError` if a text has another number of placeholders than its row has media."""
        for kind, mark in self._marks.items():
            found, wanted = text.count(mark), sum(source.kind == kind for source in example.media)
            if found != wanted:
                raise InputError(
                    f"{example.source}: its text shows {mark} {found} times and the row has {wanted} of kind {kind}; "
                    f"remove {mark} from texts, or give a model whose chat template shows each once"
                )

    def _prefixed(self, example: Example, max_length: int) -> Tokens:
        """Tokenize a prompt and its answer for a model that sees its whole prompt at once (PaliGemma).

        The processor marks the answer. Raises `InputError` for conversations, and rows without an image.
        """
        prompt, completion = example.prompt, example.completion
        if example.messages is not None and len(example.messages) == 2:
            prompt, completion = example.messages[:1], example.messages[1:]
        if isinstance(prompt, list) and isinstance(completion, list) and len(prompt) == len(completion) == 1:
            prompt, completion = (_joined_text(message) for message in (prompt[0], completion[0]))
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise InputError(f"{example.source}: this model answers one prompt with one completion; write rows of both")
        if not example.media:
            raise InputError(f"{example.source}: this model reads rows with an image only; add one, or remove the row")
        mark = str(self.processor.stock.image_token)
        placeholders = mark * len(example.media)
        arguments = {"text": [placeholders + prompt.replace("<image>", "")], PREFIX_ARGUMENT: [completion]}
        output, digests = processed(self.processor, [example.media], arguments)
        ids, labels = first_row(output["input_ids"]), first_row(output["labels"])
        image_id = self.processor.text_tokenizer.convert_tokens_to_ids(mark)
        last = max((place for place, token in enumerate(ids) if token == image_id), default=-1)
        return self._cut(example, ids, labels, last, max_length, (output, arguments, digests))

    def _cut(
        self,
        example: Example,
        ids: list[int],
        labels: list[int],
        last: int,
        max_length: int,
        made: tuple[Any, Any, Any],
    ) -> Tokens:
        """Return the tokens of a row; `last` is the place of the last token of a medium, which a cut must keep.

        Raises `InputError` if it would not, or if the processor made no inputs of the media.
        """
        output, arguments, digests = made
        if last >= max_length:
            raise InputError(
                f"{example.source}: {last + 1} tokens to the end of its last {example.media[-1].kind}, and "
                f"--max-length is {max_length}; raise it, or lower --max-image-pixels"
            )
        length = min(len(ids), max_length)
        tensors = kept_tensors(output, self.processor, length)
        if not any(name in tensors for name in media_names(self.processor)):
            raise InputError(f"{example.source}: the processor of {self.name_or_path} makes no inputs of its media")
        shapes = {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}
        inputs = Made(self.processor, example.media, arguments, digests, shapes, length)
        return Tokens(ids[:length], labels[:length], inputs=inputs, cut=len(ids) > length)


def _with_replacements(text: str, moved: Sequence[Mapping[str, Any]]) -> str:
    """Return the text that the processor tokenized."""
    pieces, reached = [], 0
    for item in moved:
        pieces += [text[reached : item["span"][0]], item["replacement"]]
        reached = item["span"][1]
    return "".join([*pieces, text[reached:]])


def _moved(place: int, moved: Sequence[Mapping[str, Any]]) -> int:
    """Return where a character of the text stands in the expanded text."""
    return place + sum(len(item["replacement"]) - len(item["text"]) for item in moved if item["span"][1] <= place)


def _joined_text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
