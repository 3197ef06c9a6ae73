"""The rows of preference tuning, and the reference that they are compared with."""
