"""Tokens in, fixed batches that a model can be called with out, and the digest of the tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from transformers import PreTrainedConfig

from onelayer.compiler.data.tokens import IGNORED, Tokens, asked_and_answered
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.digests import sha256_json


@dataclass(frozen=True)
class TokenBatch:
    """Samples of equal length, so that nothing is padded: ids (B, T) and what they predict.

    `inputs` are the arguments of the model's forward. `targets[b, t]` is the token that output position t of sample b
    predicts, or -100 if the loss does not count it. For texts with a class, `targets[b]` is that class. `order[b]` is
    the index of sample b in the given list.
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """The number of samples, and the positions of the longest sequence: an encoder-decoder's input or output."""
        sequences = [tensor for tensor in (*self.inputs.values(), self.targets) if tensor.ndim == 2]
        return len(self.order), max(tensor.shape[1] for tensor in sequences)


def tokens_digest(tokens: Iterable[Tokens]) -> str:
    """Compute the digest of token ids and labels, in order."""
    return sha256_json([[item.input_ids, item.labels if item.label is None else item.label] for item in tokens])


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
    if batch_size > 1 and pad is None and any(item.label is not None for item in tokens):
        raise InputError("config.json: field pad_token_id is not set, so a classifier takes one text at a time; set it")
    check_token_ids((item.input_ids for item in tokens), config)
    split = [_inputs(item, config) for item in tokens]
    shapes = sorted(range(len(split)), key=lambda i: tuple(-len(ids) for ids in split[i][0].values()))
    batches = []
    for _, group in groupby(shapes, key=lambda i: tuple(len(ids) for ids in split[i][0].values())):
        indices = list(group)
        for start in range(0, len(indices), batch_size):
            order = tuple(indices[start : start + batch_size])
            rows = [split[i] for i in order]
            inputs = {name: torch.tensor([row[0][name] for row in rows]) for name in rows[0][0]}
            batches.append(TokenBatch(inputs, torch.tensor([row[1] for row in rows]), order))
    return batches


def _inputs(tokens: Tokens, config: PreTrainedConfig) -> tuple[dict[str, list[int]], list[int] | int]:
    """Return the model arguments and aligned targets of one sample, or its class.

    A decoder predicts the next token. The decoder of an encoder-decoder reads what it predicts shifted right, after its
    start token.
    """
    if tokens.label is not None:
        return {"input_ids": tokens.input_ids}, tokens.label
    if not config.is_encoder_decoder:
        places = {} if tokens.positions is None else {"position_ids": tokens.positions}
        return {"input_ids": tokens.input_ids, **places}, [*tokens.labels[1:], IGNORED]
    asked, answer = asked_and_answered(tokens)
    start = getattr(config, "decoder_start_token_id", None)
    start = start if start is not None else config.pad_token_id
    return {"input_ids": asked, "decoder_input_ids": [start, *answer[:-1]]}, answer
