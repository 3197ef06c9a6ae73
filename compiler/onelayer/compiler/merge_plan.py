"""An adapter and an empty model in, the change of every stored tensor out; what cannot be merged is refused by name."""

from dataclasses import dataclass

from onelayer.compiler.adapter import Adapter
from onelayer.compiler.adapter_fit import check_fit, is_transposed
from onelayer.compiler.compat import FLOAT_DTYPES
from onelayer.compiler.errors import InputError
from onelayer.compiler.units import StreamedModel


@dataclass
class Change:
    """What becomes of one stored tensor, in this order: replaced by `dense`, `lora` added, single `rows` replaced."""

    transposed: bool = False
    dense: str | None = None
    lora: str | None = None
    rows: tuple[str, list[int]] | None = None


def plan_changes(source: Adapter, streamed: StreamedModel) -> dict[str, Change]:
    """The change of each stored tensor by its key in the checkpoint; every key of the adapter has its place there."""
    modules = check_fit(source, streamed)
    changes: dict[str, Change] = {}
    for parameter, key in source.dense.items():
        changes.setdefault(_own_tensor(source, streamed, parameter), Change()).dense = key
    for name, module in modules.items():
        change = changes.setdefault(_own_tensor(source, streamed, f"{name}.weight"), Change())
        change.lora, change.transposed = name, is_transposed(module)
    for name, rows in source.token_rows.items():
        # PEFT replaces the rows in every matrix tied to this one, so here a shared tensor is what is wanted.
        for parameter in (f"{name}.weight", *_sharing(streamed, f"{name}.weight")):
            changes.setdefault(_stored_tensor(source, streamed, parameter), Change()).rows = rows
    return changes


def _sharing(streamed: StreamedModel, parameter: str) -> list[str]:
    """Other runtime names that the same weight serves: tied in the model, or made from the same stored tensor."""
    keys, tensor = set(streamed.keys[parameter]), streamed.bare_parameter(parameter)
    others = ((name, behind) for name, behind in streamed.keys.items() if name != parameter)
    return [name for name, behind in others if keys & set(behind) or streamed.bare_parameter(name) is tensor]


def _own_tensor(source: Adapter, streamed: StreamedModel, parameter: str) -> str:
    """The key of the stored tensor that is `parameter` and nothing else."""
    if sharing := _sharing(streamed, parameter):
        raise InputError(
            f"{source.directory}: {parameter} shares its weight with {sharing[0]}, which a merge would change too; "
            "load the adapter with PEFT instead of merging it"
        )
    return _stored_tensor(source, streamed, parameter)


def _stored_tensor(source: Adapter, streamed: StreamedModel, parameter: str) -> str:
    """The key of the stored tensor behind `parameter`; refuses one that is made from several, or not of floats."""
    keys = streamed.keys[parameter]
    info = streamed.checkpoint.tensors[keys[0]]
    fits = info.shape == tuple(streamed.bare_parameter(parameter).shape) and info.dtype in FLOAT_DTYPES
    plain = any(name in streamed.plain for name in (parameter, *_sharing(streamed, parameter)))
    if len(keys) != 1 or not (plain and fits):
        raise InputError(
            f"{source.directory}: {parameter} is stored in another form ({', '.join(keys[:3])}: {info.dtype} "
            f"{info.shape}) and cannot be merged; load the adapter with PEFT instead of merging it"
        )
    return keys[0]
