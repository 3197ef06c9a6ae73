"""The settings of a pass, each declared once: type, limits, default and help text. Torch-free.

Every pass has a model of its own in its `settings.py`. The public function's keywords, the command's options and the
section of a manifest come from that model.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, ParamSpec, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from pydantic_core import ErrorDetails

from onelayer.compiler.errors import InputError
from onelayer.compiler.faults import first_detail, message_of

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Option:
    """What a command shows of a field beyond its name, type and help; `reader` names a parser of `cli/options.py`."""

    flags: str | None = None
    metavar: str | None = None
    reader: str | None = None
    default: str | None = None


@dataclass(frozen=True)
class Must:
    """The rule that a field's error message states, where it says more than the limits do."""

    rule: str


class Settings(BaseModel):
    """A set of checked values that belong together."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> Self:
        """Check keywords. Raises `TypeError` for an unknown name and `InputError` for the first wrong value."""
        for name in keywords:
            if name not in cls.model_fields:
                raise TypeError(f"got an unexpected keyword argument {name!r}; known are {', '.join(cls.model_fields)}")
        try:
            return cls(**keywords)
        except ValidationError as error:
            cause = first_detail(error).get("ctx", {}).get("error")
            raise InputError(str(cause) if isinstance(cause, InputError) else cls._refusal(error, keywords)) from None

    @classmethod
    def _refusal(cls, error: ValidationError, keywords: Mapping[str, Any]) -> str:
        """The message for the first wrong value, by the name of its option."""
        detail = first_detail(error)
        name = str(detail["loc"][0])
        value = keywords[name]
        given = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
        return f"{option_name(cls, name)} {given}: {_rule(cls, name, detail)}"

    @classmethod
    def default(cls, name: str) -> Any:
        """The default of a field, for what has the same meaning under another name."""
        return cls.model_fields[name].default

    def recorded(self, *without: str) -> dict[str, Any]:
        """What decides the result. Where and how it runs is left out, and `without`."""
        return self.model_dump(exclude={*Resumable.model_fields, *Revised.model_fields, *without})


def option_name(model: type[BaseModel], name: str) -> str:
    """The command-line name of a field."""
    flags = marker(model, name, Option).flags
    return flags.split("/")[0] if flags else f"--{name.replace('_', '-')}"


MarkerT = TypeVar("MarkerT", Option, Must)


def marker(model: type[BaseModel], name: str, kind: type[MarkerT]) -> MarkerT:
    """The marker of this kind on a field; an empty one if there is none."""
    empty: Any = Must("") if kind is Must else Option()
    return next((item for item in model.model_fields[name].metadata if isinstance(item, kind)), empty)


def members(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows, without their limits; a `Literal` is one type."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) not in (Union, UnionType):
        return (annotation,)
    return tuple(member for part in get_args(annotation) for member in members(part))


def _rule(model: type[BaseModel], name: str, detail: ErrorDetails) -> str:
    if stated := marker(model, name, Must).rule:
        return f"must {stated}"
    context, is_int = detail.get("ctx", {}), float not in members(model.model_fields[name].annotation)
    match detail["type"]:
        case "literal_error":
            words = next(item for item in members(model.model_fields[name].annotation) if get_origin(item) is Literal)
            return f"is none of {', '.join(get_args(words))}"
        case "greater_than" if is_int:
            return f"must be at least {context['gt'] + 1}"
        case "greater_than":
            return f"must be greater than {context['gt']:g}"
        case "greater_than_equal":
            return f"must be at least {context['ge']}"
    return message_of(detail)


def settings_keywords(model: type[BaseModel], keywords: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Show every setting with its default in the signature of a function that takes `**settings: Unpack[keywords]`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        own = inspect.signature(function)
        leading = [item for item in own.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
        generated = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=model.model_fields[name].default, annotation=annotation
            )
            for name, annotation in get_type_hints(keywords).items()
        ]
        function.__signature__ = own.replace(parameters=[*leading, *generated])  # type: ignore[attr-defined]
        return function

    return decorate


MaxLength = Annotated[int, Field(ge=2, description="Examples are cut at this many tokens."), Option(metavar="TOKENS")]
MaxImagePixels = Annotated[
    PositiveInt | None,
    Field(description="Images of more pixels are scaled down to this many. Default: no limit below 64 million."),
    Option(metavar="PIXELS"),
]
Samples = Annotated[PositiveInt, Field(description="How many calibration examples to use.")]
BatchSize = Annotated[PositiveInt, Field(description="Examples computed at once; more needs more memory.")]


class Lengths(Settings):
    """How long an example may be, and how large the images in it."""

    max_length: MaxLength = 512
    max_image_pixels: MaxImagePixels = None

    def lengths(self) -> dict[str, Any]:
        """Return the values as keywords; the pixels are left out if they have no limit, so that older keys stay."""
        return {name: value for name in Lengths.model_fields if (value := getattr(self, name)) is not None}

    def recorded(self, *without: str) -> dict[str, Any]:
        """Leave out pixels without a limit: records from before the field stay valid."""
        return super().recorded(*without, *(("max_image_pixels",) if self.max_image_pixels is None else ()))


class Batched(Settings):
    """How many examples a streamed pass computes at once."""

    batch_size: BatchSize = 1


class Seeded(Settings):
    """The seed of everything random."""

    seed: Annotated[NonNegativeInt, Field(description="Seed of everything random.")] = 0


class OnDevice(Settings):
    """The device that a pass computes on."""

    device: Annotated[str | None, Field(description="cpu, cuda, cuda:1, ...; by default a GPU where there is one.")] = (
        None
    )


class Machine(OnDevice):
    """The device and the host memory of a pass."""

    host_memory_bytes: Annotated[
        int | None,
        Field(
            description="Memory for the states of waiting examples, like 8GiB; the rest goes to disk. "
            "Default: half the free."
        ),
        Option(flags="--host-memory", metavar="SIZE", reader="bytes"),
    ] = None


class Resumed(Settings):
    """Whether a pass goes on where it was interrupted."""

    resume: Annotated[
        bool,
        Field(description="Take up an interrupted run with the same settings, or start over."),
        Option(flags="--resume/--no-resume"),
    ] = True


class Resumable(Machine, Resumed):
    """A pass with a device and host memory that can go on where it was interrupted."""


class Revised(Settings):
    """The revision of an original that comes from the Hub."""

    revision: Annotated[str | None, Field(description="Revision of MODEL on the Hub.")] = None
