"""Anchors: offsets by which an emulator's units answer what the original's answer, on the rows that come next."""
