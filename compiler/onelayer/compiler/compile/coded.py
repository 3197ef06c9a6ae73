"""A compile whose linears become codes with a low-rank part, weighted by what flows through and what flows back.

In: resident units with the moments of both sides of their linears. Out: codes and factors, written unit by unit.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from onelayer.compiler.codes.encode import Coded, decode, encode
from onelayer.compiler.codes.forms import RESIDUAL_DTYPE, CodeWidth
from onelayer.compiler.codes.moments import BlockGram
from onelayer.compiler.codes.residual import Sides, product_of, residual_factors
from onelayer.compiler.compile.coded_experts import code_stacks
from onelayer.compiler.compile.expert_factors import ExpertCalls
from onelayer.compiler.compile.job import Compilation
from onelayer.compiler.compile.linear_moments import MomentHooks
from onelayer.compiler.compile.writer import StoredLinear, StoredStack
from onelayer.compiler.emulators.facts import CODEBOOK, CODES, DENSE, DOWN, UP
from onelayer.compiler.emulators.figures import LinearFigures
from onelayer.compiler.factors.moments import check_rows
from onelayer.compiler.factors.quantize import dequantize_matrix, quantize_matrix
from onelayer.compiler.factors.stored_forms import FactorDtype
from onelayer.compiler.machine.meter import return_free_memory
from onelayer.compiler.models.linears import weight_of

Tensors = dict[str, torch.Tensor]


class CodedCompilation(Compilation):
    """The state of one pass that codes linears. Those of no rank are quantized whole."""

    def hooks(self, linears: dict[str, torch.nn.Module]) -> MomentHooks:
        """Return the hooks that gather the moments of both sides."""
        return MomentHooks(linears, self.device, torch.float32, sides=True)

    def compressed(self, linears: dict[str, torch.nn.Module], hooks: MomentHooks) -> Iterator[tuple[str, StoredLinear]]:
        """Yield the codes and factors of each linear that was called."""
        inputs, factored = hooks.inputs, dict[int, Sides]()
        for name, linear in linears.items():
            moments = inputs.get(name)
            if moments is None:
                continue
            check_rows(name, moments.dropped_rows, moments.rows)
            weight = weight_of(linear)
            if id(moments) not in factored:
                factored[id(moments)] = Sides.of_inputs(moments.blocks)
            sides = replace(factored[id(moments)], outputs=hooks.output_weights(name))
            rank, width = self.ranks[name], self.settings.code_width
            yield name, self._code(name, weight.to(torch.float32), moments, sides, rank, width)
            return_free_memory()  # otherwise the next solver's memory adds to the holes that this one leaves

    def _stacks(self, calls: ExpertCalls) -> Iterator[tuple[str, StoredStack]]:
        """Yield the stacks of experts, coded unless they are too small for codes."""
        if (width := self.chosen.stack_width) is None:
            yield from super()._stacks(calls)
            return

        def code(name: str, weight: torch.Tensor, moments: BlockGram, rank: int | None) -> StoredLinear:
            return self._code(name, weight, moments, Sides.of_inputs(moments.blocks), rank, width)

        yield from code_stacks(calls, self.stack_ranks, code)

    def _code(
        self,
        name: str,
        W: torch.Tensor,
        moments: BlockGram,
        sides: Sides,
        rank: int | None,
        width: CodeWidth | None,
    ) -> StoredLinear:
        """Compress a weight (out, in) to the form that the plan chose for it."""
        dtype = self.streamed.dtype
        if width is None or rank is None:
            width = None  # codes of a small weight would be no smaller than the whole weight, quantized
            stored, kept = _whole(W, RESIDUAL_DTYPE, dtype)
        else:
            stored, kept = _coded(
                W, encode(W, moments.blocks, width, moments.finite_rows), sides, rank, dtype, self.settings.seed
            )
        energies, lost = sides.energy(W), sides.energy(W - kept)
        errors = [(part / all_ if all_ > 0 else 0.0) ** 0.5 for part, all_ in zip(lost, energies, strict=True)]
        gradient_error = None if sides.outputs is None else errors[1]
        figures = LinearFigures.of_codes(name, W.shape, width, rank, energies[0], errors[0], gradient_error)
        return StoredLinear(figures, stored)


def _whole(W: torch.Tensor, factor_dtype: FactorDtype, dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    """Quantize a weight whole; return what is stored, and the weight that it stands for."""
    quantized = quantize_matrix(W, factor_dtype)
    return {DENSE: quantized}, dequantize_matrix(quantized, W.shape[1], factor_dtype, dtype).to(torch.float32)


def _coded(
    W: torch.Tensor, coded: Coded, sides: Sides, rank: int, dtype: torch.dtype, seed: int
) -> tuple[Tensors, torch.Tensor]:
    """Factor what codes leave of a weight; return what is stored, and the weight that it stands for."""
    codes, codebook = coded.packed()
    kept = decode(coded, W.shape[1], dtype).to(torch.float32)
    stored = {CODES: codes, CODEBOOK: codebook}
    if rank:
        up, down = residual_factors(W - kept, sides, rank, dtype, seed)
        stored |= {UP: up, DOWN: down}
        kept = kept + product_of(up, down, (len(W), W.shape[1]), dtype)
    return stored, kept
