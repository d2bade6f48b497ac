"""A KV cache of int8 codes: each number is a code from -127 to 127 times a scale of its token and head.

The cache is an int8 tensor [blocks, Hkv, 16, D + 4]. For each block and head, its bytes are the 16 x D codes, row by
row, followed by 16 scales in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BYTES = 4
"""Size of a scale, in int8 entries."""


def row_width(dim: int, dtype: torch.dtype) -> int:
    """Return a cache's last dimension, for a dtype and keys or values of `dim` numbers."""
    return dim + SCALE_BYTES if dtype == torch.int8 else dim


def row_dim(cache: Tensor) -> int:
    """Return how many numbers a row of a cache [blocks, Hkv, 16, width] holds."""
    return cache.shape[3] - SCALE_BYTES if cache.dtype == torch.int8 else cache.shape[3]


def parts(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of an int8 cache: codes, int8 [blocks, Hkv, 16, D], and scales, fp32 [blocks, Hkv, 16]."""
    num_blocks, num_heads, tokens, _ = cache.shape
    dim = row_dim(cache)
    flat = cache.view(num_blocks, num_heads, -1)
    codes = flat[..., : tokens * dim].view(num_blocks, num_heads, tokens, dim)
    return codes, flat[..., tokens * dim :].view(torch.float32)


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes, int8 [..., D], and scales, fp32 [...], of rows x [..., D]; the largest magnitude becomes 127.

    The scale of a row with a number that is not finite is not finite either.
    """
    x = x.float()
    scales = x.abs().amax(-1) / 127
    scales = scales.where(~(scales < torch.finfo(torch.float32).tiny), torch.zeros_like(scales))
    divisors = scales.where(scales > 0, torch.ones_like(scales))
    return (x / divisors[..., None]).round().nan_to_num().to(torch.int8), scales


def decode(cache: Tensor) -> Tensor:
    """Return the numbers of a cache [blocks, Hkv, 16, width]; an int8 one is decoded to fp32 [blocks, Hkv, 16, D]."""
    if cache.dtype != torch.int8:
        return cache
    codes, scales = parts(cache)
    return codes.float() * scales[..., None]
