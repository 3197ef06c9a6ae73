"""Pure numerics: moments, factorization, ranks, quantization, activation factors. No I/O, no models."""
