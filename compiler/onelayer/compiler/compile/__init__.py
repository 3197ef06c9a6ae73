"""The compile pass: the original streams by, an emulator is written."""
