"""Adapters and an empty model in, the change of every stored tensor out; what cannot be merged is refused by name."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from onelayer.compiler.adapters.fit import check_fit, is_transposed
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.adapters.replacements import Replacement, replacements_of
from onelayer.compiler.errors import InputError
from onelayer.compiler.libraries.modules import FLOAT_DTYPES
from onelayer.compiler.models.streamed_model import StreamedModel


@dataclass(frozen=True)
class Part:
    """An adapter and the factor that what it adds is multiplied by."""

    source: Adapter
    weight: float


@dataclass
class Change:
    """The change of one stored tensor: `replaced` whole or by rows, then `lora` added.

    `lora` are parts and their module's name.
    """

    transposed: bool = False
    lora: list[tuple[Part, str]] = field(default_factory=list)
    replaced: Replacement | None = None

    def product(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `lora` adds as one product left @ right in float32, laid out as the tensor is stored."""
        lefts, rights = [], []
        for part, name in self.lora:
            a, b = part.source.factors(name)
            b = b * (part.weight * part.source.modules[name].scaling)
            lefts.append(a.T if self.transposed else b)
            rights.append(b.T if self.transposed else a)
        return torch.cat(lefts, dim=1), torch.cat(rights, dim=0)


def plan_changes(parts: Sequence[Part], streamed: StreamedModel) -> dict[str, Change]:
    """Map each key of the checkpoint to the change of its tensor; every key of each adapter must have a place."""
    changes: dict[str, Change] = {}
    touched_by: dict[str, Adapter] = {}
    for part in parts:
        if part.weight != 1 and (part.source.dense or part.source.token_rows):
            name = next(iter(part.source.dense or part.source.token_rows))
            raise InputError(
                f"{part.source.directory}: replaces {name}, which cannot be weighted by {part.weight}; give it the "
                "weight 1"
            )
        own = _plan_one(part, streamed)
        for key, change in own.items():
            before = changes.setdefault(key, change)
            if before is not change:
                if before.replaced or change.replaced:
                    raise InputError(
                        f"{part.source.directory}: {key} is changed by {touched_by[key].directory} too, and one of "
                        "them replaces it; merge one of them alone"
                    )
                before.lora.extend(change.lora)
            touched_by.setdefault(key, part.source)
    return changes


def _plan_one(part: Part, streamed: StreamedModel) -> dict[str, Change]:
    source = part.source
    modules = check_fit(source, streamed)
    changes: dict[str, Change] = {}
    replaced = replacements_of(source, streamed)
    for parameter, replacement in replaced.items():
        key = _stored_tensor(source, streamed, parameter)
        for other in _sharing(streamed, parameter):
            if other not in replaced or not replacement.equals(replaced[other]):
                raise _shared(source, parameter, other)
        changes.setdefault(key, Change()).replaced = replacement
    for name, module in modules.items():
        parameter = f"{name}.weight"
        key = _stored_tensor(source, streamed, parameter)
        if sharing := _sharing(streamed, parameter):
            raise _shared(source, parameter, sharing[0])
        change = changes.setdefault(key, Change())
        change.lora.append((part, name))
        change.transposed = is_transposed(module)
    return changes


def _sharing(streamed: StreamedModel, parameter: str) -> list[str]:
    """Other runtime names that the same weight serves: tied in the model, or made from the same stored tensor."""
    keys, tensor = set(streamed.weights.checkpoint_keys[parameter]), streamed.weights.bare_parameters[parameter]
    others = ((name, stored) for name, stored in streamed.weights.checkpoint_keys.items() if name != parameter)
    return [name for name, stored in others if keys & set(stored) or streamed.weights.bare_parameters[name] is tensor]


def _shared(source: Adapter, parameter: str, other: str) -> InputError:
    return InputError(
        f"{source.directory}: {parameter} shares its weight with {other}, which a merge would change too; "
        "load the adapter with PEFT instead of merging it"
    )


def _stored_tensor(source: Adapter, streamed: StreamedModel, parameter: str) -> str:
    """Return the key of the stored tensor of `parameter`; refuse one that is made from several, or not of floats."""
    keys = streamed.weights.checkpoint_keys[parameter]
    info = streamed.checkpoint.tensors[keys[0]]
    fits = info.shape == tuple(streamed.weights.bare_parameters[parameter].shape) and info.dtype in FLOAT_DTYPES
    plain = any(name in streamed.weights.stored_unchanged for name in (parameter, *_sharing(streamed, parameter)))
    if len(keys) != 1 or not (plain and fits):
        raise InputError(
            f"{source.directory}: {parameter} is stored in another form ({', '.join(keys[:3])}: {info.dtype} "
            f"{info.shape}) and cannot be merged; load the adapter with PEFT instead of merging it"
        )
    return keys[0]
