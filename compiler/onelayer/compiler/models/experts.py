"""The experts of a mixture in transformers' form: matrices in stacks, found by their structure, used one by one.

In: a module. Out: a view on its stacks, if its class implements transformers' experts interface (the decorator
`use_experts_implementation`), whatever the class. Letters: E experts, N tokens, T the tokens of all calls, K experts
per token, S rows that one expert reads, H hidden, I inner width. The decorator's marks (`has_gate`, `has_bias`,
`is_transposed`, `has_post_expert_norm`, `_apply_gate`) are semi-private and are read only here.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onelayer.compiler.models.unit_memory import EXPERTS_PER_TOKEN_NAMES

_MARKS = ("config", "num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
# The number of tokens on which a class's forward is compared with the interface's.
CHECKED_TOKENS = 16


# (stack, expert, rows (S, in)) -> (S, out), without bias.
Product = Callable[[str, int, torch.Tensor], torch.Tensor]
Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class ExpertStacks:
    """The two stacks of one module of experts: the opening stack, with its gate if it has one, and the closing stack.
    A stack has the name of its parameter."""

    name: str
    module: Any

    @property
    def opening(self) -> str:
        """The parameter of the first stack."""
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    @property
    def closing(self) -> str:
        """The parameter of the second stack."""
        return "down_proj"

    @property
    def leaves(self) -> tuple[str, str]:
        """Both parameters, in the order of their use."""
        return self.opening, self.closing

    @property
    def paths(self) -> tuple[str, ...]:
        """The runtime names of both."""
        return tuple(self.path(leaf) for leaf in self.leaves)

    def path(self, leaf: str) -> str:
        """Return the runtime name of a stack."""
        return f"{self.name}.{leaf}" if self.name else leaf

    def shape(self, leaf: str) -> tuple[int, int, int]:
        """Return (E, out, in) of a stack, whether it is stored transposed or not."""
        count, rows, columns = getattr(self.module, leaf).shape
        return (count, columns, rows) if self.module.is_transposed else (count, rows, columns)

    @property
    def per_token(self) -> int:
        """The number of experts that a token is sent to; all of them if the configuration does not say."""
        numbers = (getattr(self.module.config, name, None) for name in EXPERTS_PER_TOKEN_NAMES)
        return next((number for number in numbers if isinstance(number, int)), int(self.module.num_experts))

    def weight(self, leaf: str, expert: int) -> torch.Tensor:
        """Return the weight (out, in) of one expert."""
        weight: torch.Tensor = getattr(self.module, leaf)[expert]
        return weight.T if self.module.is_transposed else weight

    def opened(self, expert: int, product_SO: torch.Tensor) -> torch.Tensor:
        """Map (S, out of the opening stack) of one expert, without bias, to (S, I), the closing stack's input."""
        return self.inner(self._with_bias(self.opening, expert, product_SO))

    def inner(self, opened_SO: torch.Tensor) -> torch.Tensor:
        """Apply the class's own gate, or its activation."""
        inner_SI: torch.Tensor = (self.module._apply_gate if self.module.has_gate else self.module.act_fn)(opened_SO)
        return inner_SI

    def routed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Routed | None:
        """Return hidden states (N, H), expert numbers and weights (N, K) of a call; None if the call is different."""
        bound = inspect.signature(type(self.module).forward).bind(self.module, *args, **kwargs)
        if len(bound.args) != 4:
            return None
        routed: Routed = bound.args[1:4]
        if not all(isinstance(item, torch.Tensor) and item.ndim == 2 for item in routed):
            return None
        numbered = not routed[1].is_floating_point() and bool((routed[1] >= 0).all())
        return routed if numbered and routed[1].shape == routed[2].shape else None

    def product(self, leaf: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Map (S, in) to (S, out) by one expert's weight, without bias."""
        return nn.functional.linear(x, self.weight(leaf, expert))

    def run(
        self, x_NH: torch.Tensor, index_NK: torch.Tensor, weights_NK: torch.Tensor, product: Product
    ) -> torch.Tensor:
        """Compute the experts' output (N, H) for N tokens as the interface says, with `product` for each weight.

        Works expert by expert, over rows that are sorted by expert. Numbers above the last expert mean none.
        """
        tokens, per_token = index_NK.shape
        numbers_S, order_S = index_NK.reshape(-1).sort(stable=True)
        count = self.module.num_experts
        rows = torch.bincount(numbers_S, minlength=count + 1)[:count].tolist()
        rows.append(tokens * per_token - sum(rows))
        if rows[-1] == len(order_S):
            return torch.zeros_like(x_NH)

        def apply(leaf: str, x_S: torch.Tensor) -> torch.Tensor:
            parts = [
                self._with_bias(leaf, expert, product(leaf, expert, x))
                for expert, x in enumerate(x_S.split(rows)[:-1])
                if len(x)
            ]
            return torch.cat([*parts, parts[0].new_zeros(rows[-1], parts[0].shape[1])])

        y_SH = apply(self.closing, self.inner(apply(self.opening, x_NH[order_S // per_token])))
        if self.module.has_post_expert_norm:
            y_SH = self.module.post_expert_norm(y_SH)
        y_SH = y_SH * weights_NK.reshape(-1)[order_S, None]
        back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
        return y_SH[back_S].view(tokens, per_token, -1).sum(dim=1).to(x_NH.dtype)

    def forward(self, product: Product) -> Callable[..., torch.Tensor]:
        """Return a forward of the module with `product` in place of its own matrices."""

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            routed = self.routed(args, kwargs)
            assert routed is not None, f"{self.name} was compiled as experts, but is called differently"
            return self.run(*routed, product)

        return forward

    def acts_as_declared(self, routed: Routed, output: Any) -> bool:
        """Whether a call computed what the interface says of its class, which is what is factorized."""
        x_NH, index_NK, weights_NK = (item[:CHECKED_TOKENS] for item in routed)
        if not isinstance(output, torch.Tensor) or output.shape != routed[0].shape:
            return False
        wanted_NH = self.run(x_NH, index_NK, weights_NK, self.product).float()
        found_NH = output[:CHECKED_TOKENS].float()
        finite = torch.isfinite(wanted_NH).all(dim=-1) & torch.isfinite(found_NH).all(dim=-1)
        tolerance = 1e-3 + 4 * torch.finfo(x_NH.dtype).eps
        lost = (found_NH - wanted_NH)[finite].norm()
        return bool(lost <= tolerance * wanted_NH[finite].norm())

    def _with_bias(self, leaf: str, expert: int, y: torch.Tensor) -> torch.Tensor:
        return y + getattr(self.module, f"{leaf}_bias")[expert].to(y.dtype) if self.module.has_bias else y


def expert_stacks(name: str, module: nn.Module) -> ExpertStacks | None:
    """Return the stacks of a module that implements the experts interface; None for any other module."""
    if not all(mark in vars(module) for mark in _MARKS):
        return None
    stacks = ExpertStacks(name, module)
    held = module._parameters
    if any(held.get(leaf) is None or getattr(module, leaf).ndim != 3 for leaf in stacks.leaves):
        return None
    (count, _, hidden), (closing_count, back, _) = (stacks.shape(leaf) for leaf in stacks.leaves)
    return stacks if count == closing_count == module.num_experts and back == hidden else None


def stacks_below(name: str, module: nn.Module) -> Iterator[ExpertStacks]:
    """Yield all modules of experts at or below a module, whose name is `name`."""
    for below, part in module.named_modules():
        stacks = expert_stacks(".".join(item for item in (name, below) if item), part)
        if stacks is not None:
            yield stacks
