"""Whether every row's sums are added in an order that does not depend on the rows beside it: one choice a process.

Then a row has the same bits in any batch. Without it an implementation may choose tiles, splits and library products by
a step's shape, which is faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 16
"""Rows of each product of `linear_in_blocks`. A library adds by the shape of the product, which is always this one."""

_is_fixed = False


def set_fixed(is_fixed: bool) -> None:
    """Set it for what is written in Python; `ops.fix_sums` sets it for all."""
    global _is_fixed
    _is_fixed = is_fixed


def are_fixed() -> bool:
    """Return whether it is set."""
    return _is_fixed


def linear_in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x @ weight.T + bias in products of the same number of rows. x: [T, K]. weight: [N, K]. bias: [N]."""
    num_rows = len(x)
    padded = F.pad(x, (0, 0, 0, -num_rows % BLOCK_ROWS))
    return torch.cat([F.linear(block, weight, bias) for block in padded.split(BLOCK_ROWS)])[:num_rows]
