"""The settings of a generation."""

from typing import Annotated, TypedDict

from pydantic import Field, NonNegativeFloat, PositiveInt

from onelayer.compiler.settings import Option, Revised, Seeded


class GenerateSettings(Seeded, Revised):
    """What can be set of a generation."""

    max_new_tokens: Annotated[PositiveInt, Field(description="The most tokens to write."), Option(metavar="TOKENS")] = (
        128
    )
    temperature: Annotated[
        NonNegativeFloat, Field(description="Sample at this temperature; 0 takes the most probable token each time.")
    ] = 0.0
    chat: Annotated[
        bool,
        Field(description="Put the prompt into the chat template, if the model has one, or continue it as it stands."),
        Option(flags="--chat/--no-chat"),
    ] = True


class GenerateKeywords(TypedDict, total=False):
    """The keywords of `generate_text`."""

    max_new_tokens: int
    temperature: float
    chat: bool
    seed: int
    revision: str | None
