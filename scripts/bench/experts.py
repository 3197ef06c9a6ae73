"""Measures the loss that low-rank experts add to a mixture, by the source of each expert's moments.

python -m scripts.bench.experts --model DIR --calibration train.jsonl --test test.jsonl --mixture DIR

No small trained mixture is available, so the script makes one. It takes a small dense model, replaces its MLPs by
experts of random weights, trains it on the calibration texts for `--steps` and saves it as `--mixture`. An existing
mixture is reused. Then it compares at equal ranks: moments of each expert's own rows, completed from all tokens (the
way of compile); moments of all tokens for every expert; the plain singular vectors of each expert's weight.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

from onelayer.compiler import compile_emulator, evaluate_model
from onelayer.compiler.compile.expert_factors import ExpertCalls
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.factors.moments import Moments
from scripts.bench.options import parser_of

EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
BATCH, LENGTH, RATE = 8, 128, 2e-3


def main() -> None:
    """Train the mixture, compile and score every variant at every ratio, and print a table."""
    parser = parser_of(__doc__, steps=200)
    parser.add_argument("--model", required=True, help="directory of a small dense model; its MLPs are not used")
    parser.add_argument("--calibration", required=True, help="texts to train the experts on, and for the moments")
    parser.add_argument("--test", required=True, help="held-out texts for the loss")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 4])
    parser.add_argument("--mixture", type=Path, required=True, help="directory of the trained mixture")
    arguments = parser.parse_args()
    if not arguments.mixture.exists():
        train_mixture(arguments, arguments.mixture)
    print(f"{'ratio':>6}{'samples':>9} {'moments':16}{'stacks':>8}{'completed':>11}{'loss':>9}{'KL':>8}{'top-1':>8}")
    for ratio in arguments.ratios:
        for samples in arguments.samples:
            for name, kind in KINDS.items():
                with kind():
                    print(measure(arguments, ratio, samples, name), flush=True)


def train_mixture(arguments: argparse.Namespace, directory: Path) -> None:
    """Make a mixture with the dense model's attention, norms and embeddings, and experts of half its inner width."""
    dense: Any = transformers.AutoModelForCausalLM.from_pretrained(arguments.model)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(arguments.model)
    fields = {**dense.config.to_dict(), "intermediate_size": dense.config.intermediate_size // 2, **EXPERTS}
    for field in ("architectures", "model_type", "attention_bias", "mlp_bias", "pretraining_tp", "dtype"):
        fields.pop(field, None)
    torch.manual_seed(0)
    model: Any = transformers.MixtralForCausalLM(transformers.MixtralConfig(**fields, router_jitter_noise=0.0))
    missing = model.load_state_dict(dense.state_dict(), strict=False).missing_keys
    assert all(".mlp." in name for name in missing), missing
    tokens = read_tokens(arguments.calibration, tokenizer, LENGTH, None, 0)
    rows = [item.input_ids for item in tokens if len(item.input_ids) == LENGTH]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    model.train()
    for step in range(arguments.steps):
        batch = torch.tensor([rows[(step * BATCH + item) % len(rows)] for item in range(BATCH)])
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 10, (arguments.steps - step) / 100)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(str(directory))


def measure(arguments: argparse.Namespace, ratio: float, samples: int, name: str) -> str:
    """Make one row: how many experts were completed, and the losses of emulator and original."""
    with tempfile.TemporaryDirectory() as output:
        compiled = compile_emulator(
            arguments.mixture,
            arguments.calibration,
            Path(output) / "emulator",
            ratio=ratio,
            samples=samples,
            max_length=LENGTH,
        )
        scored = evaluate_model(arguments.mixture, arguments.test, against=Path(output) / "emulator", max_length=LENGTH)
    assert scored.against is not None
    completed = sum(item.fallbacks for item in compiled.stacks)
    return (
        f"{ratio:6.2f}{samples:9} {name:16}{len(compiled.stacks):8}{completed:11}{scored.against.loss:9.4f}"
        f"{scored.against.kl_per_token:8.4f}{scored.against.top1_agreement:8.3f}   "
        f"(original {scored.results[0].loss:.4f})"
    )


@contextmanager
def _moments(change: Callable[[ExpertCalls, int], dict[str, Moments]]) -> Iterator[None]:
    with mock.patch.object(ExpertCalls, "moments", change):
        yield


def _none(calls: ExpertCalls, expert: int) -> dict[str, Moments]:
    """Drop the rows, so that nothing is determined."""
    return calls._moments(expert, torch.zeros(0, dtype=torch.long))


@contextmanager
def _weights_alone() -> Iterator[None]:
    """Drop an expert's rows and all tokens, so that only the weight's singular vectors are left."""
    with _moments(_none), mock.patch.object(ExpertCalls, "pooled", _none):
        yield


KINDS: dict[str, Callable[[], Any]] = {
    "own, completed": nullcontext,
    "all tokens": lambda: _moments(ExpertCalls.pooled),
    "weight's SVD": _weights_alone,
}


if __name__ == "__main__":
    main()
