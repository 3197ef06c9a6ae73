"""Rows of a recording and its transcript in, tokens out: for models that hear or see, and write (Whisper)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from onelayer.compiler.data.row_inputs import check_kinds, medium_alone
from onelayer.compiler.data.rows import Example
from onelayer.compiler.data.tokens import Tokens, tokenize
from onelayer.compiler.errors import InputError
from onelayer.compiler.media.processors import REMEDY, RowProcessor
from onelayer.compiler.storage.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TranscriptReader:
    """What tokenizes rows of one medium and what is said in it, for models that read no text (Whisper).

    `start_id` is the token that the decoder starts with; tokenizers that write it do not make it a label. `positions`
    are those of the decoder, where its configuration names them.
    """

    processor: RowProcessor
    start_id: int | None
    positions: int | None

    @classmethod
    def open(cls, directory: Path, processor: RowProcessor | None) -> "TranscriptReader":
        """Return the reader for a model's directory. Raises `InputError` without a processor that has a tokenizer."""
        if processor is None or processor.tokenizer is None:
            raise InputError(f"{directory}: holds no processor of sound or images with a tokenizer; {REMEDY}")
        config = read_json(directory / "config.json")
        return cls(processor, config.get("decoder_start_token_id"), config.get("max_target_positions"))

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of what the model writes."""
        return self.processor.text_tokenizer

    @property
    def name_or_path(self) -> str:
        """The name of the model in messages."""
        return str(self.processor.directory)

    def tokens_of(self, example: Example, max_length: int, append_eos: bool) -> Tokens:
        """Tokenize one transcript, whose tokens are all labeled, with the inputs that are made of its medium.

        Raises `InputError` for another kind of row, and for a recording or a transcript that is too long for the model.
        """
        kind = self.processor.reads[0]
        check_kinds(example, self.processor, self.processor.reads)
        if len(example.media) != 1 or example.text is None:
            raise InputError(
                f"{example.source}: the model writes the text of one {kind}; write rows of '{kind}', 'text'"
            )
        written = tokenize(replace(example, media=()), self.tokenizer, max_length + 1, append_eos)
        first = int(written.input_ids[:1] == [self.start_id])
        ids = written.input_ids[first:][:max_length]
        if self.positions is not None and len(ids) > self.positions:
            raise InputError(
                f"{example.source}: its text has {len(ids)} tokens and the model writes at most {self.positions}; "
                f"shorten it, or set --max-length to {self.positions}"
            )
        made = medium_alone(self.processor, example)
        cut = written.cut or len(written.input_ids) - first > max_length
        return Tokens(ids, list(ids), inputs=made, transcript=True, cut=cut)
