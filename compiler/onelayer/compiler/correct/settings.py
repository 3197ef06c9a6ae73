"""The settings of a correction."""

import math
from typing import Annotated, Any, Literal, TypedDict

from pydantic import BeforeValidator, Field

from onelayer.compiler.errors import InputError
from onelayer.compiler.settings import Batched, Lengths, Machine, Option

PAPER_LIMIT = 3.0
# Leaves the adapter as trained.
NO_CORRECTION = 0.0


def _checked_limit(value: Any) -> Any:
    """Refuse words other than the two known ones, and numbers that cannot be a limit."""
    if isinstance(value, str) and value not in ("auto", "default"):
        raise InputError(f"--limit {value}: must be a number, none, auto or default")
    if isinstance(value, float | int) and not 0 <= value < math.inf:
        raise InputError(f"--limit {value}: must be at least 0; leave the bound out with none")
    return value


class CorrectSettings(Lengths, Batched, Machine):
    """All settings of a correction; all except `limit` serve only to read held-out data."""

    limit: Annotated[
        float | Literal["auto", "default"] | None,
        BeforeValidator(_checked_limit),
        Field(
            description="How large a correction may be relative to the adapter; auto chooses this limit, the solver "
            "and a scale by the loss on --data."
        ),
        Option(metavar="NUMBER|none|auto|default", reader="limit", default=f"auto with --data, else {PAPER_LIMIT:g}"),
    ] = "default"


def chosen_limit(
    limit: float | Literal["auto", "default"] | None, has_data: bool, unchosen: float = PAPER_LIMIT
) -> float | Literal["auto"] | None:
    """Replace "default" by "auto" if there are held-out data, else by `unchosen`."""
    if limit == "default":
        return "auto" if has_data else unchosen
    return limit


class CorrectKeywords(TypedDict, total=False):
    """The keywords of `correct_adapter`."""

    limit: float | Literal["auto", "default"] | None
    max_length: int
    max_image_pixels: int | None
    batch_size: int
    device: str | None
    host_memory_bytes: int | None
