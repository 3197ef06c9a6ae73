"""The `args:` mappings of a manifest in, coerced values or faults out: what SFTConfig takes and a manifest may set."""

from typing import Any

from pydantic import ValidationError

from onelayer.runtime.manifest_reader import Fault, Location, faults_of
from onelayer.runtime.train_settings import REFUSED_ARGS
from onelayer.runtime.trainer_args import trainer_args_model

# Arguments of SFTConfig that a manifest decides elsewhere, with the place; beside those that training always refuses.
_RESERVED_ARGS = {
    **{name: f"cannot be set here, {remedy}" for name, remedy in REFUSED_ARGS.items()},
    "output_dir": "not here, the store decides where results go",
    "resume_from_checkpoint": "not here, an interrupted training is resumed by running the manifest again",
    "seed": "not here, set the manifest's top-level `seed`",
    "max_length": "not here, set `max_length` under `train` or the task",
}


def args_blocks(document: dict[str, Any]) -> list[tuple[dict[str, Any], Location]]:
    """Every `args:` mapping of a document that is not checked yet, with its place."""
    tasks = document.get("tasks")
    owners: list[tuple[Any, Location]] = [(document.get("train"), ("train",))]
    owners += [(task, ("tasks", name)) for name, task in tasks.items()] if isinstance(tasks, dict) else []
    return [
        (owner["args"], (*where, "args"))
        for owner, where in owners
        if isinstance(owner, dict) and isinstance(owner.get("args"), dict)
    ]


def check_args(block: dict[str, Any], where: Location) -> list[Fault]:
    """Check one `args:` mapping against SFTConfig and put the coerced values in its place."""
    faults: list[Fault] = [((*where, name), _RESERVED_ARGS[name]) for name in block if name in _RESERVED_ARGS]
    args_model = trainer_args_model()
    if args_model is None:  # without the training extra no name can be checked; the train step says what to install
        return faults
    allowed = {name: value for name, value in block.items() if name not in _RESERVED_ARGS}
    try:
        block.update(args_model.model_validate(allowed).model_dump(exclude_unset=True))
    except ValidationError as error:
        faults += [((*where, *place), text) for place, text in faults_of(error, args_model, allowed)]
    return faults
