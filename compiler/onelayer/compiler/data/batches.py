"""Tokens in, fixed batches that a model can be called with out, and the digest of the tokens."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

import torch
from transformers import PreTrainedConfig

from onelayer.compiler.data.tokens import IGNORED, RowInputs, Tokens, asked_and_answered
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.digests import sha256_json


@dataclass(frozen=True)
class BatchInputs(Mapping[str, torch.Tensor]):
    """The arguments of the model's forward for one batch: `given` exist, those of `rows` are made when they are taken.

    Rows of equal shapes make a batch by concatenation, whatever the first dimension counts: rows, images or patches.
    """

    given: Mapping[str, torch.Tensor]
    rows: Sequence[RowInputs]

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return one argument; `tensors` makes all at once."""
        return self.given[name] if name in self.given else self.tensors()[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the arguments."""
        return iter((*self.given, *self.rows[0].shapes))

    def __len__(self) -> int:
        """Count the arguments."""
        return len(self.given) + len(self.rows[0].shapes)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all arguments; pixels and features are made now, and nothing here keeps them."""
        made = [row.tensors() for row in self.rows]
        return {**self.given, **{name: torch.cat([row[name] for row in made]) for name in made[0]}}


@dataclass(frozen=True)
class TokenBatch:
    """Samples of equal length, so that nothing is padded: ids (B, T) and what they predict.

    `inputs` are the arguments of the model's forward. `targets[b, t]` is the token that output position t of sample b
    predicts, or -100 if the loss does not count it. For texts with a class, `targets[b]` is that class. `order[b]` is
    the index of sample b in the given list.
    """

    inputs: Mapping[str, torch.Tensor]
    targets: torch.Tensor
    order: tuple[int, ...]

    @property
    def made_bytes(self) -> int:
        """The bytes of the inputs that are made when the batch is taken, at four for each element."""
        rows = self.inputs.rows if isinstance(self.inputs, BatchInputs) else ()
        return sum(4 * prod(shape) for row in rows for shape in row.shapes.values())

    @property
    def shape(self) -> tuple[int, int]:
        """The number of samples, and the positions of the longest sequence: an encoder-decoder's input or output.

        1 for a batch without sequences.
        """
        given = self.inputs.given if isinstance(self.inputs, BatchInputs) else self.inputs
        sequences = [tensor for tensor in (*given.values(), self.targets) if tensor.ndim == 2]
        return len(self.order), max((tensor.shape[1] for tensor in sequences), default=1)


def tokens_digest(tokens: Iterable[Tokens]) -> str:
    """Compute the digest of token ids, labels, and what other inputs are made of, in order."""
    return sha256_json([_identity(item) for item in tokens])


def _identity(item: Tokens) -> list[object]:
    made = None if item.inputs is None else item.inputs.digest
    return [item.input_ids, item.labels if item.label is None else item.label, *([] if made is None else [made])]


def check_token_ids(rows: Iterable[Sequence[int]], config: PreTrainedConfig) -> None:
    """Raise `InputError` if a row has a token that the model has no embedding for: its tokenizer is another model's."""
    text = config.get_text_config()
    known = getattr(text, "vocab_size", None)
    if not isinstance(known, int):
        return
    known += getattr(text, "additional_vocab_size", 0)
    largest = max((max(row, default=0) for row in rows), default=0)
    if largest >= known:
        raise InputError(
            f"{config.name_or_path}: the tokenizer makes token {largest} and config.json, field vocab_size, knows "
            f"{known}; put the tokenizer of this model there"
        )


def make_batches(tokens: Sequence[Tokens], config: PreTrainedConfig, batch_size: int) -> list[TokenBatch]:
    """Make batches of at most `batch_size` samples of one shape; longest first, so that a lack of memory shows early.

    Raises `InputError` if the model cannot tell where the texts of a batch end, or does not know a token.
    """
    # Some configurations lack this field: composed models have it in a nested one, others not at all.
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    if batch_size > 1 and pad is None and any(item.label is not None and item.input_ids for item in tokens):
        raise InputError("config.json: field pad_token_id is not set, so a classifier takes one text at a time; set it")
    check_token_ids((item.input_ids for item in tokens), config)
    split = [_inputs(item, config) for item in tokens]
    shapes = [_shape(ids, item.inputs) for (ids, _), item in zip(split, tokens, strict=True)]
    longest_first = sorted(range(len(split)), key=lambda i: shapes[i])
    batches = []
    for _, group in groupby(longest_first, key=lambda i: shapes[i]):
        indices = list(group)
        for start in range(0, len(indices), batch_size):
            order = tuple(indices[start : start + batch_size])
            rows = [split[i] for i in order]
            given = {name: torch.tensor([row[0][name] for row in rows]) for name in rows[0][0]}
            made = [item for i in order if (item := tokens[i].inputs) is not None]
            inputs = BatchInputs(given, made) if made else given
            batches.append(TokenBatch(inputs, torch.tensor([row[1] for row in rows]), order))
    return batches


def _shape(ids: Mapping[str, list[int]], made: RowInputs | None) -> tuple[Any, ...]:
    """Return what rows of one batch share, longest rows first: lengths of ids, and the other inputs' shapes."""
    others = () if made is None else tuple((name, *(-size for size in shape)) for name, shape in made.shapes.items())
    return (tuple(-len(row) for row in ids.values()), others)


def _inputs(tokens: Tokens, config: PreTrainedConfig) -> tuple[dict[str, list[int]], list[int] | int]:
    """Return the model arguments and aligned targets of one sample, or its class.

    A decoder predicts the next token. The decoder of an encoder-decoder reads what it predicts shifted right, after its
    start token.
    """
    if tokens.label is not None:
        return {"input_ids": tokens.input_ids} if tokens.input_ids else {}, tokens.label
    if not config.is_encoder_decoder:
        places = {} if tokens.positions is None else {"position_ids": tokens.positions}
        return {"input_ids": tokens.input_ids, **places}, [*tokens.labels[1:], IGNORED]
    asked, answer = asked_and_answered(tokens)
    read = {"decoder_input_ids": decoder_inputs(answer, config)}
    return ({"input_ids": asked, **read} if asked else read), answer


def decoder_inputs(answer: Sequence[int], config: PreTrainedConfig) -> list[int]:
    """Return what the decoder of an encoder-decoder reads while it writes an answer: a start token, and the answer."""
    start = getattr(config, "decoder_start_token_id", None)
    return [config.pad_token_id if start is None else start, *answer[:-1]]
