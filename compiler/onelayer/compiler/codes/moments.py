"""Second moments on both sides of a linear, in blocks along the diagonal, so that neither grows with the square.

Input side: H = X^T X in blocks of `group_size` features. Output side: G, of the gradients of the loss at the outputs,
in blocks of 64. Shape letters: N rows (tokens), F features.
"""

import copy
from collections.abc import Callable

import torch

from onelayer.compiler.codes.forms import group_size
from onelayer.compiler.factors.moments import in_blocks


class BlockGram:
    """The diagonal blocks of X^T X over many batches of rows: products in float32, totals in float64.

    Rows with a non-finite entry are left out and counted, without a wait of the host. `blocks` have the shape
    (F / b, b, b), or (1, F, F) if one block holds everything; a last block that is shorter is padded with zeros.
    """

    def __init__(self, features: int, device: torch.device, block: int | None = None) -> None:
        self.features, self.block, self.device = features, min(block or group_size(features), features), device
        count = -(-features // self.block)
        self.blocks = torch.zeros(count, self.block, self.block, dtype=torch.float64, device=device)
        self.rows = 0
        self.dropped = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def dropped_rows(self) -> int:
        """The number of rows that were left out; the host waits for it."""
        return int(self.dropped)

    @property
    def finite_rows(self) -> torch.Tensor:
        """The number of rows in the totals, on their device."""
        return self.rows - self.dropped

    def add(self, x: torch.Tensor) -> None:
        """Add the rows of `x` (..., F)."""
        x_NF = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        # One non-finite entry makes the sum of its row non-finite.
        finite_N = torch.isfinite(x_NF.sum(dim=-1))
        x_NF = x_NF.masked_fill(~finite_N[:, None], 0.0)
        self.rows += len(x_NF)
        self.dropped = self.dropped + (~finite_N).sum()
        self.blocks += block_products(x_NF, self.block)

    def added_up(self, add_up: Callable[[torch.Tensor], None]) -> tuple["BlockGram", torch.Tensor]:
        """Return the sum of this one and those of other processes; `add_up` adds a tensor to theirs, in place.

        Its rows are not known yet: the second value has the rows that were left out, and all rows, on the device.
        """
        total = copy.copy(self)
        total.blocks = self.blocks.clone()
        counts = torch.stack([self.dropped, torch.tensor(self.rows).to(self.dropped)])
        add_up(total.blocks)
        add_up(counts)
        total.dropped = counts[0]
        return total, counts

    def without(self, x: torch.Tensor) -> "BlockGram":
        """Return this one without the rows of `x` (..., F)."""
        part = BlockGram(self.features, self.device, self.block)
        part.add(x)
        rest = copy.copy(self)
        rest.blocks = self.blocks - part.blocks
        rest.rows, rest.dropped = self.rows - part.rows, self.dropped - part.dropped
        return rest


def block_products(x_NF: torch.Tensor, block: int) -> torch.Tensor:
    """Compute the diagonal blocks (B, block, block) of X^T X."""
    x_BNF = in_blocks(x_NF, block)
    return x_BNF.transpose(1, 2) @ x_BNF
