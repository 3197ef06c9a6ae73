"""Compares ways to save activations in one LoRA step: saved bytes, peak bytes, seconds and gradient cosine.

Saved bytes are those of the decoder layers. The head and the loss save the same bytes in all variants; they are
printed once.

    python -m scripts.bench.activations
    python -m scripts.bench.activations --model DIR --data texts.jsonl     a trained model, whose activations are real
    python -m scripts.bench.activations --device cuda --dtype bfloat16 --hidden 2048 --batch 8 --length 2048

Without --model, a random model is built. Its activations have a flat spectrum, the worst case for the cosine; bytes and
seconds do not depend on weights. Each round runs all variants in turn, and seconds are compared within a round.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch.utils.checkpoint import checkpoint

from onelayer.compiler.data.readers import read_examples
from onelayer.compiler.data.tokens import load_tokenizer, tokenize
from onelayer.compiler.factors.stored_forms import RESIDUAL_BITS, RESIDUAL_CHOICES
from onelayer.runtime import compress_activations
from onelayer.runtime.activations.engine import Where
from onelayer.runtime.activations.figures import SavedBytes
from onelayer.runtime.activations.probe import cosine
from scripts.bench.options import parser_of

PLAIN, BASELINE = "plain LoRA", "checkpoint, every layer"
SHARES = (1 / 4, 1 / 8, 1 / 16)
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

Variant = Callable[[], AbstractContextManager[Any]]


def main() -> None:
    """Measure and print one table, and with --json one document."""
    arguments = _arguments()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.manual_seed(arguments.seed)
    model = adapted(base_model(arguments), dtype, device)
    ids = token_batch(arguments, model.config.vocab_size).to(device)
    variants: dict[str, tuple[Any, Variant]] = {name: (model, enter) for name, enter in variants_of(model).items()}
    velora = adapted(base_model(arguments), dtype, device, velora_config=peft.VeloraConfig())
    velora.load_state_dict(model.state_dict(), strict=False)
    variants["VeLoRA (PEFT)"] = (velora, nullcontext)
    fixed_bytes = bytes_outside_layers(model, ids)
    rows = {name: costs(owner, enter, ids, fixed_bytes) for name, (owner, enter) in variants.items()}
    for name, seconds in timings(variants, ids, arguments.rounds).items():
        rows[name] |= seconds
    exact = rows[PLAIN]["gradients"]
    for row in rows.values():
        row["cosine"] = cosine(exact, row.pop("gradients"))
    print(f"\n{ids.numel()} tokens; final norm, head and loss keep {fixed_bytes / 1e6:.1f} MB, counted in peaks only")
    print_table(rows)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(arguments).items()}, **rows}))


def variants_of(model: Any) -> dict[str, Variant]:
    """The ways to run the same model."""
    found: dict[str, Variant] = {
        PLAIN: nullcontext,
        BASELINE: partial(checkpointing, model, 1),
        "checkpoint, every 2nd": partial(checkpointing, model, 2),
    }
    settings: list[tuple[Where, float]] = [("layer", share) for share in SHARES]
    settings += [("sublayer", share) for share in SHARES]
    for where, share in settings:
        found[f"{where} 1/{round(1 / share)}"] = partial(compressed, model, where, share, RESIDUAL_BITS)
    for bits in RESIDUAL_CHOICES:
        if bits != RESIDUAL_BITS:
            found[f"sublayer 1/8, {bits} bits"] = partial(compressed, model, "sublayer", 1 / 8, bits)
    return found


@contextmanager
def checkpointing(model: Any, every: int) -> Iterator[None]:
    """Use transformers' checkpointing, without the hook that makes frozen embeddings pass gradients on."""
    base = model.get_base_model()
    function = partial(checkpoint, use_reentrant=False)
    base._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function, every_n_layers=every)
    try:
        yield
    finally:
        base._set_gradient_checkpointing(enable=False)


@contextmanager
def compressed(model: Any, where: Where, share: float, residual_bits: int) -> Iterator[Any]:
    """Use onelayer's compression. Its first pass, which examines the layers, runs before this is entered."""
    compression = compress_activations(model, rank=share, where=where, residual_bits=residual_bits)
    try:
        ids = torch.zeros(1, 4, dtype=torch.long, device=next(model.parameters()).device)
        model(input_ids=ids, labels=ids)
        yield compression
    finally:
        compression.remove()


def step(model: Any, ids: torch.Tensor) -> None:
    """Run forward and backward; the optimizer's work is the same in all variants."""
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def bytes_outside_layers(model: Any, ids: torch.Tensor) -> int:
    """Count the bytes saved for the backward pass of a model without its layers."""
    decoder = model.get_base_model().get_decoder()
    layers, decoder.layers = decoder.layers, torch.nn.ModuleList()
    try:
        embedded = decoder.get_input_embeddings()(ids).detach().requires_grad_()
        with SavedBytes(model) as saved:
            model(inputs_embeds=embedded, labels=ids, use_cache=False)
    finally:
        decoder.layers = layers
    return saved.total()


def costs(model: Any, enter: Variant, ids: torch.Tensor, fixed_bytes: int) -> dict[str, Any]:
    """Measure saved bytes, peak bytes and the gradient of one step."""
    with enter() as compression:
        measured = compression.measure(with_errors=False) if compression is not None else nullcontext()
        with SavedBytes(model) as saved, measured as figures:
            model(input_ids=ids, labels=ids, use_cache=False)
        total = saved.total(figures) - fixed_bytes
        peak_bytes = peak(partial(step, model, ids), ids.device)
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
    return {"saved_bytes": total, "peak_bytes": peak_bytes, "gradients": gradients}


def peak(run: Callable[[], None], device: torch.device) -> int:
    """Measure how far tensor memory rises above its start, from CUDA's allocator or from the profiler's records."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def timings(variants: dict[str, tuple[Any, Variant]], ids: torch.Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Compute the median seconds of a step and its median ratio to the baseline in the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (model, enter) in variants.items():
            with enter():
                step(model, ids)
                _wait(ids.device)
                start = time.perf_counter()
                step(model, ids)
                _wait(ids.device)
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "seconds": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, seconds[BASELINE], strict=True)),
        }
        for name, values in seconds.items()
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def base_model(arguments: argparse.Namespace) -> Any:
    """Load the model of --model, or build a random one of the requested size."""
    if arguments.model is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(arguments.model)
    heads = arguments.hidden // 64
    config = transformers.LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=max(arguments.length, 2048),
    )
    return transformers.LlamaForCausalLM(config)


def adapted(model: Any, dtype: torch.dtype, device: torch.device, **further: Any) -> Any:
    """Add LoRA on all linears, with a second factor that is small but not zero, so that both get a gradient."""
    wrapped = peft.get_peft_model(model.to(dtype).to(device), peft.LoraConfig(**LORA, **further)).train()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return wrapped


def token_batch(arguments: argparse.Namespace, vocabulary: int) -> torch.Tensor:
    """Make (batch, length) token ids: random, or from the texts in --data, one after the other."""
    count = arguments.batch * arguments.length
    if arguments.data is None:
        return torch.randint(0, vocabulary, (arguments.batch, arguments.length))
    tokenizer = load_tokenizer(Path(arguments.model))
    ids: list[int] = []
    for example in read_examples(arguments.data):
        ids += tokenize(example, tokenizer, arguments.length, append_eos=True).input_ids
        if len(ids) >= count:
            return torch.tensor(ids[:count]).reshape(arguments.batch, arguments.length)
    raise SystemExit(f"{arguments.data}: {len(ids)} tokens, but {count} are needed")


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    """Format one line per variant: bytes as shares of plain LoRA's, seconds as a ratio to checkpointing every layer."""
    plain = rows[PLAIN]
    print(f"{'':26}{'saved MB':>10}{'share':>8}{'peak MB':>10}{'share':>8}{'seconds':>9}{'ratio':>8}{'cosine':>8}")
    for name, row in rows.items():
        saved, highest = row["saved_bytes"], row["peak_bytes"]
        print(
            f"{name:26}{saved / 1e6:10.1f}{saved / plain['saved_bytes']:8.1%}"
            f"{highest / 1e6:10.1f}{highest / plain['peak_bytes']:8.1%}"
            f"{row['seconds']:9.2f}{row['ratio']:8.3f}{row['cosine']:8.4f}"
        )


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, seed=0)
    parser.add_argument("--model", help="directory of a trained causal model")
    parser.add_argument("--data", help="texts for the batch; needs --model")
    parser.add_argument("--hidden", type=int, default=512, help="width of the random model")
    parser.add_argument("--layers", type=int, default=8, help="layers of the random model")
    parser.add_argument("--vocabulary", type=int, default=4096, help="vocabulary of the random model")
    parser.add_argument("--batch", type=int, default=4, help="rows per step")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
