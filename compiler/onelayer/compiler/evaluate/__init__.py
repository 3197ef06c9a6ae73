"""The evaluate pass: the original is scored, with or without adapters."""
