"""The emulator's format: directory, reader, figures, slices."""
