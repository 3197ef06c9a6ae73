"""Activation compression (LoRAct): what is saved for the backward pass."""
