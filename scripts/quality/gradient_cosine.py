"""Measures how much an emulator's gradient agrees with the original's: a measure in minutes, without a training.

    python -m scripts.quality.gradient_cosine --model DIR --data held-out.jsonl EMULATOR...

A fresh LoRA adapter on all linears, the same for all, has one gradient per batch on the original and one on each
emulator. Prints a line of JSON for each emulator: the mean over batches of the cosine between both whole gradients,
"plain" and "anchored" by the original's own answers (`train --anchor-every`), and the loss of both on the same rows.
The original is held in memory whole.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy

from onelayer.compiler.adapters.attach import linear_targets
from onelayer.compiler.data.batches import TokenBatch, make_batches
from onelayer.compiler.data.labeled_rows import read_for
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.machine.meter import Meter
from onelayer.runtime.anchors.anchors import Anchors
from onelayer.runtime.training.inputs import TrainModel, read_model

LORA_RANK = 8


def adapted(model: TrainModel, seed: int) -> PeftModel:
    """Load a model with a fresh adapter on all linears, the same in every model that `seed` and shapes are the same of.

    Its matrices B are zero, as at the start of a training, so the gradient is that of B.
    """
    loaded = model.load()
    found = get_peft_model(loaded, LoraConfig(r=LORA_RANK, target_modules=linear_targets(loaded, "all-linear")))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(found.named_parameters()):
            if "lora_A" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return found.eval()


def gradient(model: PeftModel, batch: TokenBatch) -> tuple[torch.Tensor, float]:
    """Compute the gradient of the loss of a batch in all matrices B, as one vector, and the loss."""
    trained = {name: parameter for name, parameter in sorted(model.named_parameters()) if "lora_B" in name}
    logits = model(**batch.inputs).logits.float()
    loss = cross_entropy(logits.reshape(-1, logits.shape[-1]), batch.targets.reshape(-1))
    parts = torch.autograd.grad(loss, list(trained.values()))
    return torch.cat([part.flatten().float() for part in parts]), float(loss.detach())


def gradients(
    model: PeftModel, batches: Sequence[TokenBatch], contexts: Sequence[AbstractContextManager[Any]]
) -> tuple[list[torch.Tensor], float]:
    """Compute the gradient of each batch in its context, and the mean loss over batches."""
    found = []
    for batch, context in zip(batches, contexts, strict=True):
        with context:
            found.append(gradient(model, batch))
    return [vector for vector, _ in found], sum(loss for _, loss in found) / len(found)


def compared(
    emulator: Path, model: Path, batches: Sequence[TokenBatch], exact: Sequence[torch.Tensor], seed: int, bits: int
) -> Mapping[str, float]:
    """Compute the mean cosines and losses of an emulator, plain and anchored by offsets of `bits` bits."""
    found = adapted(read_model(emulator, str(emulator)), seed)
    plain, loss = gradients(found, batches, [nullcontext()] * len(batches))
    with Meter(torch.device("cpu")) as meter:
        anchors = Anchors(found, Emulator.open(emulator).facts, model, bits, meter, nullcontext)
        anchors.renew([batch.inputs for batch in batches])
        anchored, anchored_loss = gradients(found, batches, [anchors.next_batch() for _ in batches])
    return {
        "plain": mean_cosine(plain, exact),
        "anchored": mean_cosine(anchored, exact),
        "loss": loss,
        "anchored_loss": anchored_loss,
    }


def mean_cosine(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Compute the mean cosine of pairs of vectors."""
    pairs = zip(found, exact, strict=True)
    return sum(float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs) / len(exact)


def main() -> None:
    """Print the figures of each emulator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("emulators", nargs="+", type=Path)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--anchor-bits", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    original = read_model(given.model, str(given.model))
    rows = read_for(original.classes, given.data, original.tokenizer, given.max_length)
    # Rows of one length share a batch, so the longest are taken: nothing is padded.
    longest = sorted(rows, key=lambda row: -len(row.input_ids))[: given.rows]
    batches = make_batches(longest, original.config, given.batch_size)
    exact, loss = gradients(adapted(original, given.seed), batches, [nullcontext()] * len(batches))
    print(json.dumps({"original": str(given.model), "loss": loss, "batches": len(batches)}), flush=True)
    for emulator in given.emulators:
        figures = compared(emulator, given.model, batches, exact, given.seed, given.anchor_bits)
        rounded = {name: round(value, 4) for name, value in figures.items()}
        print(json.dumps({"emulator": str(emulator), **rounded}), flush=True)


if __name__ == "__main__":
    main()
