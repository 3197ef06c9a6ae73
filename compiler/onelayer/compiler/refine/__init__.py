"""The refine pass: an emulator's factors are trained against the original, unit by unit."""
