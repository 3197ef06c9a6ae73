"""The error for bad user input; every command turns it into a single line and exit code 2."""

# Names and values in messages come from files that may be hostile: a tensor may have a name of 40 MB.
WORD_CHARACTERS = 300
MESSAGE_CHARACTERS = 2000


class InputError(ValueError):
    """The user's input is wrong. The message is one line that names the file, the field and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """Fit a message into one printable line: long words and long messages lose their middle, controls are escaped."""
    words = (_cut(word, WORD_CHARACTERS) for word in _cut(text, 2 * MESSAGE_CHARACTERS).split())
    line = _cut(" ".join(words), MESSAGE_CHARACTERS)
    return "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in line)


def _cut(text: str, limit: int) -> str:
    """Shorten a text that is longer than `limit` by its middle: files come first in a message, remedies last."""
    if len(text) <= limit:
        return text
    return f"{text[: 2 * limit // 3]}[...]{text[len(text) - limit // 4 :]}"
