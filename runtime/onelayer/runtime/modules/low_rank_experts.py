"""Experts whose stacks are factors, run through transformers' own experts interface under a name of ours.

In: a module of experts of an empty model. Out: the same module with thin stacks instead of its wide ones; its class,
gate and norm do not change. Letters: E experts, N tokens, K experts per token, S = N K rows sorted by expert, H hidden.
Used of transformers' semi-private surface: `ALL_EXPERTS_FUNCTIONS` and the config field
`_experts_implementation_internal`, by which a module of experts chooses its function.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from onelayer.compiler.emulators.facts import DENSE, DOWN, UP, StackFacts, stack_sizes, stack_tensor
from onelayer.compiler.errors import InputError
from onelayer.compiler.models.experts import ExpertStacks, expert_stacks
from onelayer.runtime.modules.coded_linear import product_with_codes
from onelayer.runtime.modules.quantized_linear import Quantization, quantized_product
from onelayer.runtime.modules.weight_guard import GuardWeight

IMPLEMENTATION = "onelayer_low_rank"


@dataclass(frozen=True)
class CompressedStack:
    """The replacement of one stack of a module: the names of its tensors by their ending, and their quantization."""

    facts: StackFacts
    tensors: Mapping[str, str]
    quantization: Quantization | None

    def product(self, module: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Map (S, in) to (S, out) by one expert, without bias."""
        _, out_features, in_features = self.facts.shape
        held = {ending: module.get_parameter(name)[expert] for ending, name in self.tensors.items()}
        if self.quantization is None:
            return nn.functional.linear(nn.functional.linear(x, held[DOWN]), held[UP])
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if (code := self.facts.code_shape) is not None:
            return product_with_codes(x, held, (out_features, in_features), code.bits, self.quantization)
        if self.facts.rank is None:
            return quantized_product(x, held[DENSE], in_features, self.quantization, rows_are_outputs=True)
        x = quantized_product(x, held[DOWN], in_features, self.quantization, rows_are_outputs=True)
        return quantized_product(x, held[UP], out_features, self.quantization, rows_are_outputs=False)


class CompressedExperts:
    """The replacements of the stacks of one module, by the stack's parameter; other stacks do not change."""

    def __init__(self, stacks: Mapping[str, CompressedStack]) -> None:
        self.stacks = dict(stacks)

    @property
    def tensors(self) -> list[str]:
        """The names of the frozen parameters that replace stacks."""
        return [name for stack in self.stacks.values() for name in stack.tensors.values()]


def compress_experts(
    name: str, module: Any, stacks: Mapping[str, StackFacts], quantization: Quantization | None
) -> CompressedExperts:
    """Replace the `stacks` (by parameter) of the empty module `name` by empty factors.

    Raises `InputError` if the module has no such stack.
    """
    dense = expert_stacks(name, module)
    compressed = {}
    for leaf, facts in stacks.items():
        if dense is None or leaf not in dense.leaves or dense.shape(leaf) != facts.shape:
            raise InputError(
                f"config.json: quantization_config.stacks names {name}.{leaf}, which is no stack of {facts.shape} here"
            )
        sizes = stack_sizes(facts, None if quantization is None else quantization.factor_dtype)
        names = {ending: stack_tensor(leaf, ending).removeprefix(".") for ending in sizes}
        compressed[leaf] = CompressedStack(facts, names, quantization)
    assert dense is not None
    experts = CompressedExperts(compressed)
    for leaf, stack in compressed.items():
        whole = module.get_parameter(leaf)
        delattr(module, leaf)
        for ending, size in stack_sizes(
            stack.facts, None if quantization is None else quantization.factor_dtype
        ).items():
            dtype = whole.dtype if quantization is None else torch.uint8
            empty = torch.empty(size, device=whole.device, dtype=dtype)
            module.register_parameter(stack.tensors[ending], nn.Parameter(empty, requires_grad=False))
        setattr(module, leaf, GuardWeight.like(whole, whole.shape, whole.dtype))
    module.compressed_experts = experts
    # This module gets its own config, so that `set_experts_implementation` cannot choose a function that needs the
    # stacks.
    module.config = copy.copy(module.config)
    module.config._experts_implementation_internal = IMPLEMENTATION
    module._is_hf_initialized = True  # transformers' initializer would write to the stacks
    return experts


def freeze_experts(module: nn.Module) -> None:
    """Freeze the factors that replace stacks, if `module` has any."""
    experts = getattr(module, "compressed_experts", None)
    for name in experts.tensors if isinstance(experts, CompressedExperts) else ():
        module.get_parameter(name).requires_grad_(False)


def low_rank_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Map (N, H), expert numbers and their weights (N, K) to (N, H), as transformers' own functions do.

    Works expert by expert: factors are thin and of any rank, and the grouped kernels need strides of 16 bytes. Factors
    are frozen, so a plain product keeps nothing for its backward pass.
    """
    dense, stacks = ExpertStacks("", self), self.compressed_experts.stacks

    def product(leaf: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        compressed = stacks.get(leaf)
        return dense.product(leaf, expert, x) if compressed is None else compressed.product(self, expert, x)

    return dense.run(hidden_states, top_k_index, top_k_weights, product)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, low_rank_experts)
