"""Compares ways to make codes on some linears of a real model, by their error on held-out rows.

    python -m scripts.quality.code_errors outputs rotation rounds windows --model DIR --data train.jsonl

`outputs`: ways to hold G, the moments of the gradients at a linear's outputs, by which the low-rank part is chosen:
bytes, processor seconds of gathering and solving, and errors. `rotation`: codes of the weight as it is, and of the
weight whose inputs are rotated by a randomized Hadamard transform. `rounds`: codes that take their moments as exact,
and codes and factors that are made again in turns, or in the other order. `windows`: codes of one byte, and codes whose
windows overlap, each with the factors that it leaves room for. "forward" is the squared relative error of
the outputs, "both" that of the outputs weighted by the gradients that flow back to them.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy import fft, linalg  # type: ignore[import-untyped]

from onelayer.compiler.codes.encode import decode, encode
from onelayer.compiler.codes.forms import CODE_SHAPES, CodeShape, CodeWidth, coded_bytes, direction_bytes, fitting_codes
from onelayer.compiler.codes.moments import BlockGram, block_products
from onelayer.compiler.codes.residual import Sides, product_of, residual_factors
from onelayer.compiler.factors.moments import OUTPUT_DAMPING, OutputWeights
from scripts.quality.code_linears import HEAD, Linear, Rows, moments_of, read_linears

OUTPUT_BLOCK = 64
BLOCKS, SKETCHES = (1, 16, 64, 256), (16, 64)
BYTE_WIDTHS: tuple[CodeWidth, ...] = (3, 4, 5, 6, 8)
Factors = tuple[torch.Tensor, torch.Tensor]


# ---- ways to hold G ---------------------------------------------------------------------------------------------


def left_vectors(M: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the leading left singular vectors of M."""
    tall = M.shape[0] > M.shape[1]
    values, vectors = torch.linalg.eigh((M.T @ M if tall else M @ M.T).double())
    chosen: torch.Tensor = vectors[:, -rank:].float()
    return (M @ chosen) / values[-rank:].float().clamp_min(1e-30).sqrt() if tall else chosen


def by_root(R: torch.Tensor, S: torch.Tensor, rank: int, apply: Callable[..., torch.Tensor]) -> Factors:
    """Return the best factors of R under G = L L^T; `apply(M)` is L^T M, and `apply(M, inverse=True)` is L^-T M."""
    U = left_vectors(apply(R) @ S, rank)
    return apply(U, inverse=True), U.T @ apply(R)


def unweighted(R: torch.Tensor, S: torch.Tensor, rank: int) -> tuple[int, Factors]:
    """Hold nothing: all outputs count alike."""

    def apply(M: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
        return M

    return 0, by_root(R, S, rank, apply)


def in_blocks(rows: Rows, block: int) -> tuple[int, Callable[..., torch.Tensor]]:
    """Hold G's diagonal blocks."""
    blocks = block_products(rows.g, block).double()
    weights = OutputWeights.of(blocks, rows.g.shape[1])
    assert weights is not None

    def apply(M: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
        return weights.unweighted(M) if inverse else weights.weighted(M)

    return 8 * blocks.numel(), apply


def with_sketch(rows: Rows, columns: int) -> tuple[int, Callable[..., torch.Tensor]]:
    """Hold G's diagonal and G times a random matrix of some columns; what these span is added (Nystroem)."""
    outputs = rows.g.shape[1]
    omega = torch.linalg.qr(torch.randn(outputs, columns, generator=torch.Generator().manual_seed(0))).Q
    Y, diagonal = rows.g.T @ (rows.g @ omega), rows.g.square().sum(0)
    values, vectors = torch.linalg.eigh((omega.T @ Y).double())
    low = Y @ (vectors / values.clamp_min(values[-1] * 1e-7).sqrt()).float()
    rest = (diagonal - low.square().sum(1)).clamp_min(0) + OUTPUT_DAMPING * diagonal.mean()
    U, sizes, _ = torch.linalg.svd(low / rest.sqrt()[:, None], full_matrices=False)
    gain = (1 + sizes.square()).sqrt()

    def apply(M: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:  # the root is D^1/2 (I + U (gain - 1) U^T)
        scaled: torch.Tensor = M if inverse else rest.sqrt()[:, None] * M
        scaled = scaled + U @ (((1 / gain if inverse else gain) - 1)[:, None] * (U.T @ scaled))
        return scaled / rest.sqrt()[:, None] if inverse else scaled

    return 8 * outputs * (columns + 1), apply


def smaller_side(rows: Rows, R: torch.Tensor, S: torch.Tensor, rank: int) -> tuple[int, Factors]:
    """Hold R^T G R (I, I), for which gradients have to come back once more when the codes are known."""
    gR, damping = rows.g @ R, OUTPUT_DAMPING * rows.g.square().sum(0).mean()
    V = torch.linalg.eigh((S.T @ (gR.T @ gR + damping * R.T @ R) @ S).double()).eigenvectors[:, -rank:].float()
    return 8 * R.shape[1] ** 2, (R @ S @ V, torch.linalg.solve(S.T, V).T)


def compare_outputs(linears: list[Linear], given: argparse.Namespace) -> None:
    """Print a line for each way to hold G and each linear."""
    keep = given.keep_bytes[-1]
    print("linear: way: MB held, seconds, forward, both")
    for linear in linears:
        R, rank, S = residual_of(linear, keep)
        ways: dict[str, Callable[[], tuple[int, Factors]]] = {"none": partial(unweighted, R, S, rank)}

        def way(make: Callable[[Rows], Any], linear: Linear = linear, R: Any = R, S: Any = S, rank: int = rank) -> Any:
            held, apply = make(linear.calibration)
            return held, by_root(R, S, rank, apply)

        for block in (*BLOCKS, *([len(R)] if len(R) <= 4096 else [])):
            ways[f"blocks of {block}"] = partial(way, partial(in_blocks, block=block))
        for columns in SKETCHES:
            ways[f"diagonal and {columns} columns"] = partial(way, partial(with_sketch, columns=columns))
        ways["smaller side"] = partial(smaller_side, linear.calibration, R, S, rank)
        for name, solve in ways.items():
            started = time.process_time()
            held, (up, down) = solve()
            seconds = time.process_time() - started
            forward, both = linear.errors(R - up @ down)
            print(f"{linear.name}: {name}: {held / 1e6:.2f}, {seconds:.2f}, {forward:.4f}, {both:.4f}", flush=True)


def codes_of(linear: Linear, keep_bytes: float) -> tuple[CodeShape, int]:
    """Return the codes that compile chooses for a linear by itself, and the rank of its factors."""
    coded = fitting_codes({"": (len(linear.W), linear.W.shape[1])}, keep_bytes, every=True)
    assert coded is not None
    shape, ranks = coded
    return shape, ranks[""] or 0


def residual_of(linear: Linear, keep_bytes: float) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Return what codes leave of a weight, the rank of its factors, and a root of the moments of the inputs."""
    shape, rank = codes_of(linear, keep_bytes)
    moments = moments_of(linear.calibration.x)
    coded = encode(linear.W, moments, shape, len(linear.calibration.x))
    kept = decode(coded, linear.W.shape[1], torch.float32)
    return linear.W - kept, rank, Sides.of_inputs(moments).S[0]


# ---- rotation ---------------------------------------------------------------------------------------------------


def randomized_hadamard(size: int) -> torch.Tensor:
    """Make an orthogonal matrix (size, size): signs, a Hadamard matrix of a power of two, a cosine transform."""
    power = size & -size
    mixed = torch.tensor(linalg.hadamard(power) / power**0.5)
    rest = torch.tensor(fft.dct(torch.eye(size // power, dtype=torch.float64).numpy(), norm="ortho", axis=0))
    signs = 2.0 * torch.randint(2, (size, 1), generator=torch.Generator().manual_seed(0)) - 1
    return signs * torch.kron(rest, mixed)


def compare_rotation(linears: list[Linear], given: argparse.Namespace) -> None:
    """Print the errors of codes with and without a rotation."""

    def ways(linear: Linear, keep_bytes: float) -> dict[str, tuple[float, float]]:
        shape, rank = codes_of(linear, keep_bytes)
        Q = randomized_hadamard(linear.W.shape[1])
        return {"as it is": coded_errors(linear, shape, rank), "rotated": coded_errors(linear, shape, rank, Q)}

    _compare(linears, given, ways)


def compare_rounds(linears: list[Linear], given: argparse.Namespace) -> None:
    """Print the errors of codes that trust their moments wholly, and of codes and factors made in turns."""

    def ways(linear: Linear, keep_bytes: float) -> dict[str, tuple[float, float]]:
        shape, rank = codes_of(linear, keep_bytes)
        found = {"once": coded_errors(linear, shape, rank)}
        found["moments as exact"] = coded_errors(linear, shape, rank, exact=True)
        found |= {f"{count} rounds": coded_errors(linear, shape, rank, rounds=count) for count in (2, 3)}
        return found | {"factors first": coded_errors(linear, shape, rank, factors_first=True)}

    _compare(linears, given, ways)


def compare_windows(linears: list[Linear], given: argparse.Namespace) -> None:
    """Print the errors of codes of one byte, the finest that leave a quarter bit, and of all whose windows overlap."""

    def ways(linear: Linear, keep_bytes: float) -> dict[str, tuple[float, float]]:
        sides = len(linear.W), linear.W.shape[1]
        budget, found = int(2 * keep_bytes * linear.W.numel()), dict[str, tuple[float, float]]()
        widest = next((width for width in BYTE_WIDTHS if 8 / width + 0.25 <= 16 * keep_bytes), BYTE_WIDTHS[-1])
        for shape in (CodeShape(widest, 8), *CODE_SHAPES):
            rank = (budget - coded_bytes(*sides, shape, 0)) // direction_bytes(*sides)
            if rank > 0:
                found[f"{shape.bits} bits for {shape.width}"] = coded_errors(linear, shape, rank)
        return found

    _compare(linears, given, ways)


def _compare(linears: list[Linear], given: argparse.Namespace, ways: Any) -> None:
    """Print errors by way as multiples of the first way's, for every linear and size; then their means."""
    for keep_bytes in given.keep_bytes:
        shares: dict[str, list[tuple[float, float]]] = {}
        for linear in linears:
            if linear.name == HEAD:
                continue
            found = ways(linear, keep_bytes)
            first = next(iter(found.values()))
            for way, errors in found.items():
                shares.setdefault(way, []).append((errors[0] / first[0], errors[1] / first[1]))
            told = "; ".join(f"{way} {shares[way][-1][0]:.3f}, {shares[way][-1][1]:.3f}" for way in found)
            print(
                f"{keep_bytes}: {linear.name}: forward {first[0]:.4f}, both {first[1]:.4f}; times that: {told}",
                flush=True,
            )
        means = {way: torch.tensor(pairs).mean(0).tolist() for way, pairs in shares.items()}
        print(f"{keep_bytes}: mean: " + "; ".join(f"{way} {a:.3f}, {b:.3f}" for way, (a, b) in means.items()))


def coded_errors(
    linear: Linear,
    code: CodeShape,
    rank: int,
    Q: torch.Tensor | None = None,
    *,
    rounds: int = 1,
    exact: bool = False,
    factors_first: bool = False,
) -> tuple[float, float]:
    """Return the errors of codes and their quantized factors, made of W Q for inputs x Q if Q is given."""
    moments, W, rows = moments_of(linear.calibration.x), linear.W, len(linear.calibration.x)
    shape = (W.shape[0], W.shape[1])
    if Q is not None:
        moments, W = Q.T @ moments @ Q, (W.double() @ Q).float()
    outputs = BlockGram(len(W), W.device, OUTPUT_BLOCK)
    outputs.add(linear.calibration.g)
    inputs = Sides.of_inputs(moments)
    sides = Sides(inputs.H, inputs.S, OutputWeights.of(outputs.blocks, len(W)))

    def factored(R: torch.Tensor) -> torch.Tensor:
        return product_of(*residual_factors(R, sides, rank, torch.float32, 0), shape, torch.float32)

    low = factored(W) if factors_first else torch.zeros_like(W)
    for _ in range(rounds):
        kept = decode(encode(W - low, moments, code, math.inf if exact else rows), W.shape[1], torch.float32)
        low = factored(W - kept)
    kept = kept + low
    return linear.errors(linear.W - (kept if Q is None else (kept.double() @ Q.T).float()))


COMPARED = {
    "outputs": compare_outputs,
    "rotation": compare_rotation,
    "rounds": compare_rounds,
    "windows": compare_windows,
}


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=list(COMPARED))
    parser.add_argument("--model", type=Path, required=True, help="directory of a causal model")
    parser.add_argument("--data", type=Path, required=True, help="rows of text")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 26])
    parser.add_argument("--keep-bytes", type=float, nargs="+", default=[0.12, 0.145])
    parser.add_argument("--rows", type=int, default=12, help="for calibration")
    parser.add_argument("--held-out", type=int, default=4, help="rows on which errors are measured")
    given = parser.parse_args()
    linears = read_linears(given)
    for what in given.what:
        COMPARED[what](linears, given)


if __name__ == "__main__":
    main()
