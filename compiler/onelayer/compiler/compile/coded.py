"""A compile whose linears become codes with a low-rank part, weighted by what flows through and what flows back.

In: resident units with the moments of both sides of their linears. Out: codes and factors, written unit by unit. The
experts of a mixture are coded after all calls, by the moments of what each of them reads. Letters as in
`models/experts.py`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from onelayer.compiler.codes.encode import Coded, decode, encode
from onelayer.compiler.codes.forms import RESIDUAL_DTYPE, CodeShape
from onelayer.compiler.codes.moments import BlockGram
from onelayer.compiler.codes.residual import Sides, product_of, residual_factors
from onelayer.compiler.compile.expert_factors import ExpertCalls, OneAtATime, Place, check_finite, places_of, stacked
from onelayer.compiler.compile.job import Compilation
from onelayer.compiler.compile.linear_moments import MomentHooks
from onelayer.compiler.compile.solving import Solved, in_turn, solve_all
from onelayer.compiler.compile.writer import StoredLinear, StoredStack
from onelayer.compiler.emulators.facts import CODEBOOK, CODES, DENSE, DOWN, UP
from onelayer.compiler.emulators.figures import LinearFigures
from onelayer.compiler.factors.expectations import Expectations
from onelayer.compiler.factors.moments import check_rows, dropped_rows
from onelayer.compiler.factors.quantize import dequantize_matrix, quantize_matrix
from onelayer.compiler.factors.stored_forms import FactorDtype
from onelayer.compiler.models.linears import weight_of

Tensors = dict[str, torch.Tensor]
# (name, weight (out, in), moments of its inputs, rank, expectations) -> its form.
Code = Callable[[str, torch.Tensor, BlockGram, int | None, Expectations], Solved]
# What the figures say of an expert whose own rows are fewer than its inputs.
COMPLETED = "completed by rows of other experts"


class CodedCompilation(Compilation):
    """The state of one pass that codes linears. Those of no rank are quantized whole."""

    def hooks(self, linears: dict[str, torch.nn.Module]) -> MomentHooks:
        """Return the hooks that gather the moments of both sides."""
        return MomentHooks(linears, self.device, torch.float32, sides=True)

    def compressed(self, linears: dict[str, torch.nn.Module], hooks: MomentHooks) -> dict[str, StoredLinear]:
        """Return the codes and factors of each linear that was called, on the host."""
        known = hooks.inputs
        inputs = {name: known[name] for name in linears if name in known}
        dropped = dropped_rows([gram.dropped for gram in inputs.values()])
        for (name, gram), count in zip(inputs.items(), dropped, strict=True):
            check_rows(name, count, gram.rows)
        factored: dict[tuple[int, bool], tuple[Sides, torch.Tensor | None]] = {}

        def shared(moments: BlockGram, expected: Expectations) -> Sides:
            """Factor moments once for all linears that read the same; each expects what that takes for granted."""
            key = (id(moments), expected.looks)
            if key not in factored:
                own = Expectations(expected.looks)
                factored[key] = Sides.of_inputs(moments.blocks, own), own.all_held
            sides, held = factored[key]
            if held is not None:
                expected.holds(held)
            return sides

        def solve(name: str, expected: Expectations) -> Solved:
            moments, weight = inputs[name], weight_of(linears[name]).to(torch.float32)
            sides = replace(shared(moments, expected), outputs=hooks.output_weights(name, expected))
            return self._code(name, weight, moments, sides, self.ranks[name], self.chosen.code, expected)

        return solve_all(in_turn(inputs), solve, self.device)

    def _stacks(self, calls: ExpertCalls) -> Iterator[tuple[str, StoredStack]]:
        """Yield the stacks of experts, coded unless they are too small for codes."""
        if (shape := self.chosen.stack_code) is None:
            yield from super()._stacks(calls)
            return

        def code(
            name: str, weight: torch.Tensor, moments: BlockGram, rank: int | None, expected: Expectations
        ) -> Solved:
            return self._code(name, weight, moments, Sides.of_inputs(moments.blocks, expected), rank, shape, expected)

        yield from code_stacks(calls, self.stack_ranks, code)

    def _code(
        self,
        name: str,
        W: torch.Tensor,
        moments: BlockGram,
        sides: Sides,
        rank: int | None,
        code: CodeShape | None,
        expected: Expectations,
    ) -> Solved:
        """Compress a weight (out, in) to the form that the plan chose for it."""
        dtype = self.streamed.dtype
        if code is None or rank is None:
            code = None  # codes of a small weight would be no smaller than the whole weight, quantized
            stored, kept = _whole(W, RESIDUAL_DTYPE, dtype)
        else:
            coded = encode(W, moments.blocks, code, moments.finite_rows, expected)
            stored, kept = _coded(W, coded, sides, rank, dtype, self.settings.seed, expected)
        numbers = (sides.energy(W), sides.energy(W - kept))
        figures = partial(_figures, name, W.shape, code, rank, sides.outputs is not None)
        return Solved(stored, numbers, figures)


def _figures(
    name: str,
    shape: torch.Size,
    code: CodeShape | None,
    rank: int | None,
    is_weighted: bool,
    energies: torch.Tensor,
    lost: torch.Tensor,
) -> LinearFigures:
    """Tell the figures of a coded weight from the energies of its outputs and of their errors, for both sides."""
    pairs = zip(lost.tolist(), energies.tolist(), strict=True)
    forward, both = ((part / all_ if all_ > 0 else 0.0) ** 0.5 for part, all_ in pairs)
    energy, gradient_error = float(energies[0]), both if is_weighted else None
    return LinearFigures.of_codes(name, shape, code, rank, energy, forward, gradient_error)


def _whole(W: torch.Tensor, factor_dtype: FactorDtype, dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    """Quantize a weight whole; return what is stored, and the weight that it stands for."""
    quantized = quantize_matrix(W, factor_dtype)
    return {DENSE: quantized}, dequantize_matrix(quantized, W.shape[1], factor_dtype, dtype).to(torch.float32)


def _coded(
    W: torch.Tensor,
    coded: Coded,
    sides: Sides,
    rank: int,
    dtype: torch.dtype,
    seed: int,
    expected: Expectations,
) -> tuple[Tensors, torch.Tensor]:
    """Factor what codes leave of a weight; return what is stored, and the weight that it stands for."""
    codes, codebook = coded.packed()
    kept = decode(coded, W.shape[1], dtype).to(torch.float32)
    stored = {CODES: codes, CODEBOOK: codebook}
    if rank:
        up, down = residual_factors(W - kept, sides, rank, dtype, seed, expected)
        stored |= {UP: up, DOWN: down}
        kept = kept + product_of(up, down, (len(W), W.shape[1]), dtype)
    return stored, kept


def code_stacks(calls: ExpertCalls, ranks: Mapping[str, int | None], code: Code) -> Iterator[tuple[str, StoredStack]]:
    """Yield each stack that `ranks` names, with all of its experts coded.

    An expert that reads fewer rows than it has inputs is weighted by rows of all tokens too, as many as it lacks.
    Raises `RuntimeError` naming the experts if too many rows are not finite.
    """
    stacks, rows = calls.stacks, calls.sort()
    dropped: dict[Place, torch.Tensor] = {}
    places = places_of(stacks, ranks, len(rows))
    widest = max(stacks.shape(leaf)[2] for leaf, _ in places)

    def gathered(expert: int) -> tuple[dict[str, BlockGram], dict[str, BlockGram] | None]:
        own = _inputs(calls, expert, calls.tokens(expert))
        return own, _inputs(calls, expert, calls.pool()) if rows[expert] < widest else None

    gathered_of = OneAtATime(gathered)

    def solve(place: Place, expected: Expectations) -> Solved:
        leaf, expert = place
        own, pooled = gathered_of(expert)
        moments, lacking = own[leaf], own[leaf].features - own[leaf].rows
        dropped[place] = moments.dropped
        if pooled is not None and lacking > 0:
            moments = copy.copy(moments)
            moments.blocks = moments.blocks + lacking / max(1, pooled[leaf].rows) * pooled[leaf].blocks
            moments.rows += lacking
        name, weight = f"{stacks.path(leaf)}[{expert}]", stacks.weight(leaf, expert).to(torch.float32)
        solved = code(name, weight, moments, ranks[stacks.path(leaf)], expected)
        return replace(solved, figures=_completed(solved)) if lacking > 0 else solved

    stored = solve_all(places, solve, calls.device)
    check_finite(stacks, dropped, rows)
    yield from stacked(stacks, stored, rows)


def _completed(solved: Solved) -> Callable[..., LinearFigures]:
    """Return what tells the figures of an expert that other experts' rows completed."""

    def figures(*numbers: Any) -> LinearFigures:
        return solved.figures(*numbers).model_copy(update={"fallback": COMPLETED})

    return figures


def _inputs(calls: ExpertCalls, expert: int, tokens: torch.Tensor) -> dict[str, BlockGram]:
    """Return the moments of the inputs of an expert by stack, over the given tokens."""
    stacks, (opening, closing) = calls.stacks, calls.stacks.leaves
    moments = {leaf: BlockGram(stacks.shape(leaf)[2], calls.device) for leaf in stacks.leaves}
    for x_SH in calls.rows(tokens):
        moments[opening].add(x_SH)
        moments[closing].add(stacks.opened(expert, stacks.product(opening, expert, x_SH)))
    return moments
