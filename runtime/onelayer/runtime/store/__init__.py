"""The artifact store: records, locks, pruning."""
