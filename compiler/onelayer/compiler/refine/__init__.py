"""The refine pass: trains an emulator's factors against the original, unit by unit."""
