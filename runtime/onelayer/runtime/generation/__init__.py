"""Text from a model that fits in memory, to try what was trained."""
