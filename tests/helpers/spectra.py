"""Matrices with a known spectrum."""

import torch


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spectral(tokens: int, features: int, power: float) -> torch.Tensor:
    """Make a matrix of random directions whose singular values fall as a power of their number."""
    noise = generator(1)
    left = torch.linalg.qr(torch.randn(tokens, features, generator=noise)).Q
    right = torch.linalg.qr(torch.randn(features, features, generator=noise)).Q
    matrix: torch.Tensor = (left * torch.arange(1, features + 1).float() ** -power) @ right.T
    return matrix
