"""The error for bad user input; every command turns it into a single line and exit code 2."""


class InputError(ValueError):
    """The user's input is wrong. The message is one line that names the file, the field and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
