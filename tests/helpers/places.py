"""The repository's root directory."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
