"""PEFT adapters: reading, attaching, writing, merging."""
