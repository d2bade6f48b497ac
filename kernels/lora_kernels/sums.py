"""Process-wide choice whether every row's sums have a fixed order, independent of the other rows.

A row then has the same bits in any batch. Otherwise an implementation may choose tiles, splits and library products by
a step's shape, which is faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 16
"""Rows of each product in `linear_in_blocks`.

A library's order of sums depends on the product's shape, which is thus fixed.
"""

_is_fixed = False


def set_fixed(is_fixed: bool) -> None:
    """Set the choice for code in Python; `ops.fix_sums` sets it everywhere."""
    global _is_fixed
    _is_fixed = is_fixed


def are_fixed() -> bool:
    """Return whether sums have a fixed order."""
    return _is_fixed


def linear_in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x @ weight.T + bias, in products with a constant number of rows. x: [T, K]. weight: [N, K]. bias: [N]."""
    num_rows = len(x)
    padded = F.pad(x, (0, 0, 0, -num_rows % BLOCK_ROWS))
    return torch.cat([F.linear(block, weight, bias) for block in padded.split(BLOCK_ROWS)])[:num_rows]
