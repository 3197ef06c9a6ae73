"""Measures the cost of compile: solvers against the published route, the whole pass against a bare streamed forward.

    python -m scripts.bench.compile [--width 1024] [--layers 3] [--samples 64] [--tokens 512] [--rounds 3]

Everything runs in one process on the same weights and moments. Figures are medians over interleaved rounds, and their
ratios. Weights are random, so their spectra are as flat as possible.
"""

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm

from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.data.batches import make_batches
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.data.tokens import load_tokenizer
from onelayer.compiler.factors.factorize import Method, factorize
from onelayer.compiler.factors.moments import Gram, Moments
from onelayer.compiler.factors.ranks import rank_for
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.streaming.stream import Stream
from scripts.bench.options import parser_of

CPU = torch.device("cpu")
RATIO = 0.25


def published(W: torch.Tensor, G: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factorize as SVD-LLM and EMLoC publish it: eigh of the input's Gram, full SVD of W S, inverse of S; float32."""
    scale = G.trace() / len(G)
    values, vectors = torch.linalg.eigh(G / scale)
    S = vectors * (values.clamp_min(1e-7) * scale).sqrt()
    U, s, Vt = torch.linalg.svd(W @ S, full_matrices=False)
    root = s[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * (Vt[:rank] @ torch.linalg.inv(S))


def output_error(W: torch.Tensor, up: torch.Tensor, down: torch.Tensor, G: torch.Tensor) -> float:
    """Compute the relative error over the rows summed in G, in float64 for every contender."""
    E = W.double() - up.double() @ down.double()
    energy = ((W.double() @ G.double()) * W.double()).sum()
    return float((((E @ G.double()) * E).sum() / energy).sqrt())


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Time some work; return the seconds and its result."""
    start = time.perf_counter()
    value = work()
    return time.perf_counter() - start, value


def bench_solvers(width: int, rounds: int) -> None:
    """Compare time and error of the published route, `exact` and `fast` for square, wide and tall linears."""
    generator = torch.Generator().manual_seed(0)
    broad = int(2.75 * width)
    print(
        f"{'linear, out x in':22} {'rank':>5} {'route':10} {'seconds':>8} {'ratio':>6} {'error':>11} {'above best':>13}"
    )
    for kind, (rows, columns) in {"square": (width, width), "wide": (width, broad), "tall": (broad, width)}.items():
        W = torch.randn(rows, columns, generator=generator) / columns**0.5
        mix, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator))
        X = (torch.randn(4 * columns, columns, generator=generator) * torch.logspace(0, -1.5, columns)) @ mix
        rank = rank_for(RATIO, rows, columns)
        assert rank is not None
        G = X.T @ X
        of_input = rows >= columns
        gram = Gram(columns if of_input else rows, CPU)
        gram.add(X if of_input else X @ W.T)
        energy = None if of_input else X.square().sum(dim=0, dtype=torch.float64)
        moments = Moments(gram, of_input, energy)
        routes: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]] = {
            "published": partial(published, W, G, rank),
            "exact": partial(_pair, W, moments, rank, "exact"),
            "fast": partial(_pair, W, moments, rank, "fast"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in routes}
        errors = {}
        for _ in tqdm(range(rounds), desc=kind, disable=None, leave=False):
            for name, route in routes.items():
                taken, (up, down) = timed(route)
                seconds[name].append(taken)
                errors[name] = output_error(W, up, down, G)
        for name in routes:
            ratio = median(p / q for p, q in zip(seconds["published"], seconds[name], strict=True))
            above = errors[name] / errors["exact"] - 1
            print(
                f"{f'{kind} {rows} x {columns}':22} {rank:5} {name:10} {median(seconds[name]):8.2f} {ratio:6.1f} "
                f"{errors[name]:11.7f} {above:13.4%}"
            )


def _pair(W: torch.Tensor, moments: Moments, rank: int, solver: Any) -> tuple[torch.Tensor, torch.Tensor]:
    factors = factorize(W, moments, rank, torch.float32, Method(solver))
    return factors.up, factors.down


def make_model(
    directory: Path, width: int, layers: int, samples: int, tokens: int, dtype: str = "float32"
) -> tuple[Path, Path]:
    """Write a random Llama, a tokenizer of one word per token, and texts of exactly `tokens` tokens."""
    shape: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": int(2.75 * width),
        "num_hidden_layers": layers,
        "vocab_size": 512,
    }
    heads: dict[str, Any] = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    config = transformers.LlamaConfig(**shape, **heads, max_position_embeddings=tokens, tie_word_embeddings=False)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(directory / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")
    tokenizer.save_pretrained(directory / "model")
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 512, (samples, tokens), generator=generator).tolist()
    texts = (json.dumps({"text": " ".join(f"w{i}" for i in row)}) + "\n" for row in rows)
    (directory / "data.jsonl").write_text("".join(texts))
    return directory / "model", directory / "data.jsonl"


def bench_pass(width: int, layers: int, samples: int, tokens: int, rounds: int) -> None:
    """Time the compile with both solvers, and a bare streamed forward over the same batches."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model, data = make_model(directory, width, layers, samples, tokens)

        def bare() -> float:
            streamed = StreamedModel(model)
            batches = make_batches(read_tokens(data, load_tokenizer(model), tokens), streamed.config, 1)
            last = max(unit.position for unit in streamed.units if unit.is_block)
            with Meter(CPU) as meter:
                stream = Stream(streamed, CPU, meter, stop_after=last)
                return timed(lambda: stream.run([batch.inputs for batch in batches], lambda index, output: None))[0]

        def compiled(solver: Any, output: str) -> float:
            settings: dict[str, Any] = {"ratio": RATIO, "samples": samples, "max_length": tokens, "device": "cpu"}
            return compile_emulator(model, data, directory / output, solver=solver, **settings).report.seconds

        passes: dict[str, list[float]] = {"bare forward": [], "compile fast": [], "compile exact": []}
        for number in tqdm(range(rounds), desc="passes", disable=None, leave=False):
            passes["bare forward"].append(bare())
            passes["compile fast"].append(compiled("fast", f"fast{number}"))
            passes["compile exact"].append(compiled("exact", f"exact{number}"))
        print(f"\n{layers} layers of width {width}, {samples} samples of {tokens} tokens, keep-ratio {RATIO}")
        for kind, seconds in passes.items():
            ratio = median(p / q for p, q in zip(seconds, passes["bare forward"], strict=True))
            print(f"{kind:14} {median(seconds):8.1f} s {ratio:6.2f} x the bare streamed forward")


def main() -> None:
    """Parse the arguments and print both tables."""
    arguments = parser_of(__doc__, width=1024, layers=3, samples=64, tokens=512, rounds=3).parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    bench_solvers(arguments.width, arguments.rounds)
    bench_pass(arguments.width, arguments.layers, arguments.samples, arguments.tokens, arguments.rounds)


if __name__ == "__main__":
    main()
