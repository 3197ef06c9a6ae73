"""The polish pass: exact LoRA steps on the original."""
