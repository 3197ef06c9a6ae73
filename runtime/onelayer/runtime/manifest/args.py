"""Checks the `args:` mappings of a manifest, which are passed on to a trainer's own configuration."""

from typing import Any

from pydantic import ValidationError

from onelayer.compiler.faults import Fault, Location, faults_of
from onelayer.runtime.training.trainer_args import METHODS, Method, refused_args, reporter_fault, trainer_args_model

# Arguments that a manifest sets elsewhere, with the place.
_RESERVED_ARGS = {
    "output_dir": "not here, the store decides where results go",
    "resume_from_checkpoint": "not here, an interrupted training is resumed by running the manifest again",
    "seed": "not here, set the manifest's top-level `seed`",
    "max_length": "not here, set `max_length` under `train` or the task",
}


def method_of(document: dict[str, Any]) -> Method:
    """Return the method of an unchecked document; `sft` if it names none that exists."""
    train = document.get("train")
    named = train.get("method") if isinstance(train, dict) else None
    return next((method for method in METHODS if method == named), METHODS[0])


def args_blocks(document: dict[str, Any]) -> list[tuple[dict[str, Any], Location]]:
    """List every `args:` mapping of an unchecked document, with its place."""
    tasks = document.get("tasks")
    owners: list[tuple[Any, Location]] = [(document.get("train"), ("train",))]
    owners += [(task, ("tasks", name)) for name, task in tasks.items()] if isinstance(tasks, dict) else []
    return [
        (owner["args"], (*where, "args"))
        for owner, where in owners
        if isinstance(owner, dict) and isinstance(owner.get("args"), dict)
    ]


def check_args(block: dict[str, Any], where: Location, method: Method) -> list[Fault]:
    """Check one `args:` mapping against the method's configuration and put the coerced values in its place."""
    refused = {name: f"cannot be set here, {remedy}" for name, remedy in refused_args(method).items()} | _RESERVED_ARGS
    faults: list[Fault] = [((*where, name), refused[name]) for name in block if name in refused]
    args_model = trainer_args_model(method)
    if args_model is None:  # without the training extra no name can be checked; the train step names what to install
        return faults
    if (fault := reporter_fault(block.get("report_to"))) is not None:
        faults.append(((*where, "report_to"), fault))
    allowed = {name: value for name, value in block.items() if name not in refused}
    try:
        block.update(args_model.model_validate(allowed).model_dump(exclude_unset=True))
    except ValidationError as error:
        faults += [((*where, *place), text) for place, text in faults_of(error, args_model, allowed)]
    return faults
