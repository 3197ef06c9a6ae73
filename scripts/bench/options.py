"""The command line of a benchmark: its docstring as the help, and an option for each number that may be changed."""

import argparse


def parser_of(description: str | None, **defaults: float) -> argparse.ArgumentParser:
    """Return a parser that shows `description` as it is written, with a whole number or a share for each default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser
