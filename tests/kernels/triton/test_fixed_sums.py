"""Fixed sums in the interpreted Triton kernels: other tiles, the same answers; and the product that only they use.

That a row has the same bits beside others follows from the launches (`test_triton.py`). The interpreter cannot show it:
it computes tiles with the host's library, whose sums depend on a row's position in the tile.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.fixed_sums import fixed_sums
from helpers.kernel_cases import assert_close, attention_case, lora_case, poisoned_memory, randn

from lora_kernels import ops

DTYPES = (torch.float32, torch.float16)


def test_lora_and_attention_match_the_reference() -> None:
    lora = lora_case(np.arange(70) % 3, [16, 3, 64], k=48, widths=(40, 24), dtype=torch.float32)
    step = (1, 33, 1, 2), (65, 33, 16, 90)
    attention = attention_case(*step, (6, 2), (32, 16), torch.float32, window=33, softcap=5.0, sinks=True)
    with fixed_sums():
        for actual, expected in zip(lora.run("triton"), lora.expected(), strict=True):
            assert_close(actual, expected)
        assert_close(attention.run("triton"), attention.expected())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "n", "k"), [(1, 16, 16), (33, 70, 100), (64, 128, 65)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_product_matches_the_reference(num_rows: int, n: int, k: int, has_bias: bool, dtype: torch.dtype) -> None:
    x, weight = randn(num_rows, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1) / k**0.5
    bias = randn(n, dtype=dtype, seed=2) if has_bias else None
    expected = x.float() @ weight.float().T + (0 if bias is None else bias.float())
    with fixed_sums(), poisoned_memory():
        actual = ops.linear(x, ops.pack_linear(weight, impl="triton"), bias, impl="triton")
    assert_close(actual, expected)
