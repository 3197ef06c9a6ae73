"""A transformers model without its weights: units, linears, experts, loading rules."""
