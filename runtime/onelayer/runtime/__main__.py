"""The entry of the `onelayer` command, and of `python -m onelayer.runtime`."""

import sys


def main() -> None:
    """Import the command line and run it; Ctrl-C during the import ends without a traceback, as it does later."""
    try:
        from onelayer.runtime.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
