"""Checks, before exact steps, that a model keeps packed examples apart."""

import inspect
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from onelayer.compiler.data.batches import make_batches
from onelayer.compiler.data.packing import Pack, join_rows
from onelayer.compiler.data.tokens import Tokens
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.scoring import Scoring
from onelayer.compiler.streaming.stream import Stream

# How far rounding may move the losses of tokens, on average and relative to them. In float32, rows that see each other
# moved them further in every architecture; in bfloat16 the effect was smaller than this in some small random models
# (scripts/sweep/architectures.py --packing).
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def check_takes_positions(model: PreTrainedModel) -> None:
    """Raise `InputError` if a model cannot know where a row begins."""
    kind, takes = type(model).__name__, inspect.signature(type(model).forward).parameters
    if model.config.is_encoder_decoder or not model.can_generate() or "position_ids" not in takes:
        raise InputError(f"--packing: {kind} does not predict the next token at positions it is given; leave it out")
    # Recurrent layers, as transformers calls them, and short convolutions carry over too little to show reliably in the
    # losses of bfloat16.
    if model._is_stateful or any(isinstance(module, torch.nn.Conv1d) for module in model.modules()):
        raise InputError(f"--packing: {kind} has layers whose state runs on from row to row; leave it out")


def check_apart(stream: Stream, packs: Sequence[Pack]) -> None:
    """Run some packs, and their rows alone; raise `InputError` if the losses differ by more than rounding."""
    packs = [[Tokens(row.input_ids, row.input_ids) for row in pack] for pack in packs]
    config = stream.streamed.config
    batches = [batch for pack in packs for row in (join_rows(pack), *pack) for batch in make_batches([row], config, 1)]
    scoring = Scoring(batches, 1, stream.spill_pool)
    stream.run(scoring.inputs(), scoring.take)
    scoring.finish(stream.device)
    index = 0
    for pack in packs:
        together = scoring.token_losses(index)
        alone = torch.cat([scoring.token_losses(index + 1 + number) for number in range(len(pack))])
        index += 1 + len(pack)
        first = len(pack[0].input_ids) - 1
        change, expected = change_of(together, alone, first, stream.streamed.dtype)
        if change > expected:
            kind = type(stream.streamed.model).__name__
            raise InputError(
                f"--packing: {kind} does not keep packed rows apart: the loss of a token changes by {change:.2g}, "
                f"by rounding at most {expected:.2g}; leave it out"
            )


def change_of(together: torch.Tensor, alone: torch.Tensor, first: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return the mean change of the losses after the `first` ones, in nats, and the most that rounding explains.

    The first row of a pack has the positions that it has alone, so it shows nothing.
    """
    return float((together - alone)[first:].abs().mean()), ROUNDING[dtype] * float(alone[first:].mean())
