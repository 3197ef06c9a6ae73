"""Second moments on both sides of a linear, in blocks along the diagonal, so that neither grows with the square.

Input side: H = X^T X in blocks of `group_size` features. Output side: G, of the gradients of the loss at the outputs,
in blocks of 64. Shape letters: N rows (tokens), F features.
"""

import copy

import torch

from onelayer.compiler.codes.forms import group_size


class BlockGram:
    """The diagonal blocks of X^T X over many batches of rows: products in float32, totals in float64.

    Rows with a non-finite entry are left out and counted. `blocks` have the shape (F / b, b, b), or (1, F, F) if one
    block holds everything; a last block that is shorter is padded with zeros.
    """

    def __init__(self, features: int, device: torch.device, block: int | None = None) -> None:
        self.features, self.block, self.device = features, min(block or group_size(features), features), device
        count = -(-features // self.block)
        self.blocks = torch.zeros(count, self.block, self.block, dtype=torch.float64, device=device)
        self.rows = 0
        self.dropped_rows = 0

    def add(self, x: torch.Tensor) -> None:
        """Add the rows of `x` (..., F)."""
        x_NF = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        self.rows += len(x_NF)
        if not torch.isfinite(x_NF.sum()):
            keep_N = torch.isfinite(x_NF).all(dim=-1)
            self.dropped_rows += int((~keep_N).sum())
            x_NF = x_NF[keep_N]
        self.blocks += block_products(x_NF, self.block)

    def without(self, x: torch.Tensor) -> "BlockGram":
        """Return this one without the rows of `x` (..., F)."""
        part = BlockGram(self.features, self.device, self.block)
        part.add(x)
        rest = copy.copy(self)
        rest.blocks = self.blocks - part.blocks
        rest.rows, rest.dropped_rows = self.rows - part.rows, self.dropped_rows - part.dropped_rows
        return rest


def in_blocks(x_NF: torch.Tensor, block: int) -> torch.Tensor:
    """Cut the features of (N, F) into blocks (B, N, block); the last is padded with zeros."""
    padded = torch.nn.functional.pad(x_NF, (0, -x_NF.shape[-1] % block))
    return padded.reshape(len(x_NF), -1, block).transpose(0, 1)


def block_products(x_NF: torch.Tensor, block: int) -> torch.Tensor:
    """Compute the diagonal blocks (B, block, block) of X^T X."""
    x_BNF = in_blocks(x_NF, block)
    return x_BNF.transpose(1, 2) @ x_BNF


def times_blocks(M: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Multiply M (rows, F) by the block-diagonal matrix of `blocks` (B, b, b)."""
    product = in_blocks(M, blocks.shape[-1]) @ blocks
    return product.transpose(0, 1).reshape(len(M), -1)[:, : M.shape[1]]


def blocks_times(blocks: torch.Tensor | None, M: torch.Tensor) -> torch.Tensor:
    """Multiply symmetric `blocks` (B, b, b) by M (F, columns); None stands for the identity."""
    return M if blocks is None else times_blocks(M.T, blocks).T
