"""A transformers model in, the same model training in less memory out: one line, for anybody's training loop.

    compress_activations(model, rank=0.125)

The forward pass stays exact. What is stored for backward is compressed (LoRAct, arXiv 2509.23472, and what its factors
leave in two bits a value) and the rest is recomputed, so gradients are approximate. The returned handle measures how
close they are, and removes the compression.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.stored_forms import RESIDUAL_BITS, RESIDUAL_CHOICES
from onelayer.runtime.activations.engine import ActivationEngine, Where
from onelayer.runtime.activations.figures import Figures
from onelayer.runtime.activations.layer_plan import LayerPlan
from onelayer.runtime.activations.stored_copies import StoredCopies

logger = logging.getLogger("onelayer")

Rank = int | float
DEFAULT_RANK: Rank = 0.125


class ActivationCompression:
    """The handle of a compressed model: its setting, which layers fell back, figures, and `remove`."""

    def __init__(self, model: PreTrainedModel, rank: Rank, where: Where, residual_bits: int, seed: int) -> None:
        self.model = model
        self._copies = StoredCopies(rank, residual_bits, seed)
        self._engine = ActivationEngine(model, self._copies, where, self._fell_back)
        self._said: set[str] = set()
        self._enable: Callable[..., None] = model._set_gradient_checkpointing
        try:
            self._enable(enable=True, gradient_checkpointing_func=self._engine.run)
        except ValueError as error:
            self._engine.remove()
            raise InputError(f"{type(model).__name__} has no layers that can be recomputed: {error}") from error
        model._set_gradient_checkpointing = self._keep  # type: ignore[method-assign]

    @property
    def rank(self) -> Rank | None:
        """The rank, a number or a share of the features; may be set between two forward passes. None keeps all."""
        return self._copies.rank

    @rank.setter
    def rank(self, rank: Rank | None) -> None:
        self._copies.rank = rank

    @property
    def residual_bits(self) -> int:
        """Bits of each value's residual, which are stored in addition to the factors."""
        return self._copies.residual_bits

    @property
    def where(self) -> Where:
        """The requested form: "layer" or "sublayer"."""
        return self._engine.where

    @property
    def fallbacks(self) -> dict[str, str]:
        """Layers that are recomputed whole although `where` is "sublayer", and why; known after the first forward."""
        return {name: plan for name, plan in self._engine.plans.items() if isinstance(plan, str)}

    @property
    def norms(self) -> list[str]:
        """The norms whose outputs are stored, by name; known after the first forward."""
        plans = self._engine.plans.items()
        return [f"{name}.{part}" for name, plan in plans if isinstance(plan, LayerPlan) for part in plan.norms]

    @contextmanager
    def measure(self, with_errors: bool = True) -> Iterator[Figures]:
        """Collect figures of the forward passes inside `with`; for the errors, each stored tensor is rebuilt once."""
        outer, self._copies.figures = self._copies.figures, Figures(with_errors=with_errors)
        try:
            yield self._copies.figures
        finally:
            self._copies.figures = outer

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Recompute layers from their exact inputs inside `with`, as transformers' own checkpointing does."""
        rank, where = self._copies.rank, self._engine.where
        self._copies.rank, self._engine.where = None, "layer"
        try:
            yield
        finally:
            self._copies.rank, self._engine.where = rank, where

    def remove(self) -> None:
        """Restore the model's own forward, and its own checkpointing, switched off."""
        del self.model._set_gradient_checkpointing
        self._enable(enable=False)
        self._engine.remove()

    def _keep(self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1) -> None:
        """Replace the model's own switch: only one way to recompute can be on, and a trainer must not change it."""
        if enable:
            self._say("activations are compressed, which takes the place of the checkpointing that was switched on")
        self._enable(enable=enable, gradient_checkpointing_func=self._engine.run)

    def _fell_back(self, name: str, reason: str) -> None:
        self._say(f"activations of whole layers are compressed, not of sub-layers, from {name} on: {reason}")

    def _say(self, text: str) -> None:
        if text.partition(" from ")[0] not in self._said:
            self._said.add(text.partition(" from ")[0])
            logger.warning("%s", text)


def compress_activations(
    model: nn.Module,
    *,
    rank: Rank = DEFAULT_RANK,
    where: Where = "sublayer",
    residual_bits: int = RESIDUAL_BITS,
    seed: int = 0,
) -> ActivationCompression:
    """Train `model`, of transformers or diffusers or one wrapped by PEFT, with compressed activations from now on.

    `rank` is the number of rows kept of each stored matrix, or as a float below 1 its share of the hidden size.
    `where` is "sublayer" or "layer", see the engine. `residual_bits` are the bits of each value's residual: 2, which
    the commands use, 1 or 4, or 0 for LoRAct as published. Nothing changes outside of training or in the global random
    state. Raises `InputError` for settings and models that cannot be used.
    """
    if where not in ("layer", "sublayer"):
        raise InputError(f"where: {where!r}; give layer or sublayer")
    if isinstance(rank, bool) or not (rank >= 1 if isinstance(rank, int) else 0 < rank < 1):
        raise InputError(f"rank: {rank!r}; give a number of rows, or a share of the hidden size below 1")
    if isinstance(residual_bits, bool) or residual_bits not in RESIDUAL_CHOICES:
        raise InputError(f"residual_bits: {residual_bits!r}; give one of {', '.join(map(str, RESIDUAL_CHOICES))}")
    # Models of diffusers have this method as well. A PEFT model passes it on, but its class has none.
    base: Any = next(
        (module for module in model.modules() if hasattr(type(module), "_set_gradient_checkpointing")), None
    )
    if base is None:
        raise InputError(f"{type(model).__name__} is no model of transformers or diffusers, nor does it hold one")
    if "_set_gradient_checkpointing" in vars(base):
        raise InputError("the activations of this model are compressed already; remove() the first compression")
    return ActivationCompression(base, rank, where, residual_bits, seed)
