"""Quantized originals: how their weights are stored, and what they are when unpacked."""
