"""Measures the arithmetic of training with LoRA: a block of linears, norms and activations, forward and back.

One large product alone says too much: next to it are norms, activations, conversions and the adapter's narrow products,
which took more than half of a step on a processor with matrix units (manifests/LOG.md).
"""

import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

WIDTH, INNER = 2048, 6144
LORA_RANK = 8
# The rank of factors that keep about an eighth of a square weight.
FACTOR_RANK = 128
TOKENS = {"cpu": 256, "cuda": 4096}
SECONDS = 0.3
# Forward, and back to the inputs.
FLOPS_PER_WEIGHT = 4


class _Adapted(nn.Module):
    """A frozen linear, whole or as factors, with a LoRA in float32 as PEFT keeps it."""

    def __init__(self, columns: int, rows: int, rank: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = (columns, rows) if rank is None else (columns, rank, rows)
        frozen = (nn.Linear(*pair, bias=False, dtype=dtype) for pair in pairwise(sizes))
        self.frozen = nn.Sequential(*frozen).requires_grad_(False)
        self.lora = nn.Sequential(nn.Linear(columns, LORA_RANK, bias=False), nn.Linear(LORA_RANK, rows, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (T, columns) to (T, rows)."""
        y: torch.Tensor = self.frozen(x)
        change: torch.Tensor = self.lora(x.float())
        return y + change.to(y.dtype)


class _Block(nn.Module):
    """What attention and an MLP have in common, twice with a residual."""

    def __init__(self, rank: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.RMSNorm(WIDTH, dtype=dtype), _Adapted(WIDTH, WIDTH, rank, dtype))
        widen, narrow = _Adapted(WIDTH, INNER, rank, dtype), _Adapted(INNER, WIDTH, rank, dtype)
        self.mlp = nn.Sequential(nn.RMSNorm(WIDTH, dtype=dtype), widen, nn.SiLU(), narrow)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (T, WIDTH) to the same."""
        mixed: torch.Tensor = x + self.mix(x)
        widened: torch.Tensor = self.mlp(mixed)
        return mixed + widened


def block_flops_per_second(device: torch.device, dtype: torch.dtype, factored: bool = False) -> float:
    """Measure operations per second in the frozen weights of a block, whole ones or factors, for less than a second."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = _Block(FACTOR_RANK if factored else None, dtype).to(device)
        x = torch.randn(TOKENS.get(device.type, TOKENS["cuda"]), WIDTH).to(device, dtype).requires_grad_()
    weights = sum(weight.numel() for weight in block.parameters() if weight.ndim == 2 and not weight.requires_grad)

    def step() -> None:
        block(x).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return FLOPS_PER_WEIGHT * weights * len(x) / _seconds_each(step)


def _seconds_each(work: Callable[[], None]) -> float:
    work()  # the first one loads libraries
    count, started = 0, time.perf_counter()
    while count < 1 or time.perf_counter() - started < SECONDS:
        work()
        count += 1
    return (time.perf_counter() - started) / count
