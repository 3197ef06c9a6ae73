"""`python -m onelayer.runtime` is the `onelayer` command."""

from onelayer.runtime.cli.main import main

if __name__ == "__main__":
    main()
