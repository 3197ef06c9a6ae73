"""How many values a unit makes of one token, from shapes alone: what a bound on its activations is counted by."""

from onelayer.compiler.experts import ExpertStacks, stacks_below
from onelayer.compiler.shapes import routed_width
from onelayer.compiler.units import StreamedModel, Unit


def unit_width(streamed: StreamedModel, unit: Unit) -> int:
    """Inputs and outputs of all matrices of a unit, those of experts once for each that a token is sent to."""
    experts = list(stacks_below(unit.name, unit.module))
    stacked = {path for found in experts for path in found.paths}
    names = (name for name in unit.parameters if name not in unit.lazy and name not in stacked)
    shapes = (streamed.bare_parameter(name).shape for name in names)
    return sum(sum(shape[-2:]) for shape in shapes if len(shape) >= 2) + sum(map(expert_width, experts))


def expert_width(found: ExpertStacks) -> int:
    """What one module of experts reads and gives of one token."""
    (_, opened, hidden), (_, _, inner) = (found.shape(leaf) for leaf in found.leaves)
    return routed_width(found.per_token, opened, inner, hidden)


def widest(streamed: StreamedModel) -> int:
    """Of the unit that makes most."""
    return max(unit_width(streamed, unit) for unit in streamed.units)
