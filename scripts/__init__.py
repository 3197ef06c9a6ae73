"""Scripts that check the claims of the project; run one with `python -m scripts.FOLDER.NAME`."""
