"""Measures the arithmetic of training with LoRA: a block of linears, norms and activations, forward and back.

One large product alone says too much: next to it are norms, activations, conversions and the adapter's narrow products,
which took more than half of a step on a processor with matrix units (manifests/LOG.md).
"""

import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

# A wider model has the rate of this width, and of this many tokens at once: larger products gain little.
WIDEST = 2048
MOST_TOKENS = {"cpu": 512, "cuda": 4096}
# An MLP's width compared with the model's, and the rank of factors that keep about an eighth of a square weight.
INNER_RATIO, RANK_SHARE = 3, 16
LORA_RANK = 8
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

    def __init__(self, width: int, rank: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        inner = INNER_RATIO * width
        self.mix = nn.Sequential(nn.RMSNorm(width, dtype=dtype), _Adapted(width, width, rank, dtype))
        widen, narrow = _Adapted(width, inner, rank, dtype), _Adapted(inner, width, rank, dtype)
        self.mlp = nn.Sequential(nn.RMSNorm(width, dtype=dtype), widen, nn.SiLU(), narrow)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (T, width) to the same."""
        mixed: torch.Tensor = x + self.mix(x)
        widened: torch.Tensor = self.mlp(mixed)
        return mixed + widened


def block_flops_per_second(
    device: torch.device, dtype: torch.dtype, *, width: int, tokens: int, factored: bool = False
) -> float:
    """Measure operations per second in the frozen weights of a block, whole ones or factors, for about a second.

    `width` is that of the model, `tokens` are those computed at once.
    """
    width, tokens = min(width, WIDEST), min(tokens, MOST_TOKENS.get(device.type, MOST_TOKENS["cuda"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = _Block(width, max(1, width // RANK_SHARE) if factored else None, dtype).to(device)
        x = torch.randn(tokens, width).to(device, dtype).requires_grad_()
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
