"""The trainable replacements of coded stacks of experts. Letters as in `models/experts.py`, and k the rank."""

from collections.abc import Callable, Mapping

import torch

from onelayer.compiler.emulators.facts import CODEBOOK, DOWN, UP
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.machine.transfers import Arrivals
from onelayer.compiler.models.experts import ExpertStacks
from onelayer.compiler.refine.trained_linears import SCALES, TrainedCodes, TrainedLinear, coded_tensors, times_coded


class TrainedStack(TrainedCodes):
    """A coded stack: the masters of a coded weight, with a first dimension of E experts; the codes stay."""

    def read(self, emulator: Emulator, name: str) -> dict[str, torch.Tensor]:
        """Read the masters from an emulator."""
        held, (count, _, self.in_features) = emulator.stack(name), emulator.facts.stacks[name].shape
        experts = [emulator.coded_expert(name, held, expert) for expert in range(count)]
        self.codes, self.bits = torch.stack([coded.codes for coded, _ in experts]), experts[0][0].bits
        factors = [residual for _, residual in experts if residual is not None]
        return {
            CODEBOOK: torch.stack([coded.codebook for coded, _ in experts]),
            SCALES: torch.stack([coded.scales for coded, _ in experts]),
            UP: torch.stack([up.T for up, _ in factors]),
            DOWN: torch.stack([down for _, down in factors]),
        }

    def as_stored(self, ending: str, master: torch.Tensor) -> torch.Tensor:
        """Round a master to what is stored of it; the rows of all experts at once."""
        return super().as_stored(ending, master.flatten(0, 1)).view_as(master)

    def products(self, *, twice: bool) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """Return the function that maps (S, in) to (S, out) by an expert, as the emulator does.

        With `twice`, it has a second derivative.

        It takes the masters apart once: each part of its own would have a gradient as large as all of them.
        """
        parts = {ending: rounded.unbind() for ending, rounded in self.rounded.items()}

        def product(expert: int, x: torch.Tensor) -> torch.Tensor:
            used = {ending: part[expert] for ending, part in parts.items()}
            return times_coded(x, self.codes[expert], self.bits, used, self.in_features, twice=twice)

        return product

    def stored(self, arrived: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors as an emulator stores them, by ending, from the masters on the host."""
        assert self.factor_dtype is not None
        experts = [
            coded_tensors(
                codes, self.bits, {ending: master[expert] for ending, master in arrived.items()}, self.factor_dtype
            )
            for expert, codes in enumerate(self.codes)
        ]
        return {ending: torch.stack([expert[ending] for expert in experts]) for ending in experts[0]}


class TrainedExperts:
    """The trainable replacement of a module of experts, whose coded stacks are trained and whose others are its own."""

    def __init__(self, emulator: Emulator, stacks: ExpertStacks, dtype: torch.dtype, device: torch.device) -> None:
        self._experts = stacks
        self.stacks = {
            leaf: TrainedStack(emulator, stacks.path(leaf), dtype, device) for leaf in coded_leaves(emulator, stacks)
        }

    @property
    def masters(self) -> dict[str, torch.Tensor]:
        """What is trained of all stacks, in float32, by the ending of their names."""
        return {f"{end}_{leaf}": held for leaf, stack in self.stacks.items() for end, held in stack.masters.items()}

    @property
    def rounded(self) -> dict[str, torch.Tensor]:
        """The masters as they were last rounded."""
        return {f"{end}_{leaf}": held for leaf, stack in self.stacks.items() for end, held in stack.rounded.items()}

    def round(self) -> None:
        """Round the present masters to the form in which they are stored."""
        for stack in self.stacks.values():
            stack.round()

    def hand_gradients(self) -> None:
        """Give the gradients of the rounded masters, gathered since the last `round`, to the masters."""
        for stack in self.stacks.values():
            stack.hand_gradients()

    def forward_of(self, module: torch.nn.Module, *, twice: bool) -> Callable[..., torch.Tensor]:
        """Return the forward of the module with these stacks; `twice`: it has a second derivative."""
        products = {leaf: stack.products(twice=twice) for leaf, stack in self.stacks.items()}

        def product(leaf: str, expert: int, x: torch.Tensor) -> torch.Tensor:
            return products[leaf](expert, x) if leaf in products else self._experts.product(leaf, expert, x)

        return self._experts.forward(product)

    def to_store(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return what the host needs to store the stacks, on the device, by parameter."""
        return {leaf: stack.to_store() for leaf, stack in self.stacks.items()}

    def stored(self, arrived: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the tensors as an emulator stores them, by what their names have after the module's."""
        return {
            f"{end}_{leaf}": held
            for leaf, stack in self.stacks.items()
            for end, held in stack.stored(arrived[leaf]).items()
        }


Trained = TrainedLinear | TrainedExperts


def stored_of(linears: Mapping[str, Trained]) -> dict[str, torch.Tensor]:
    """Return what is stored of a unit's linears, on the host, by what names have after the unit's; one wait for all."""
    arrivals = Arrivals()
    arrived = arrivals.begin({path: linear.to_store() for path, linear in linears.items()})
    arrivals.wait()
    return {
        f"{path}{ending}": tensor
        for path, linear in linears.items()
        for ending, tensor in linear.stored(arrived[path]).items()
    }


def coded_leaves(emulator: Emulator, stacks: ExpertStacks) -> list[str]:
    """List the stacks of a module that the emulator holds as codes, by parameter."""
    known = emulator.facts.stacks
    return [
        leaf for leaf in stacks.leaves if (path := stacks.path(leaf)) in known and known[path].code_width is not None
    ]
