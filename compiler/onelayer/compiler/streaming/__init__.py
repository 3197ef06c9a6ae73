"""The lockstep engine: every batch runs through one resident unit at a time, forward and backward."""
