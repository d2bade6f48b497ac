"""Fixed sums in the native kernels, per instruction set: see `helpers.fixed_sums`."""

from __future__ import annotations

import pytest
import torch
from helpers.fixed_sums import assert_attention_is_fixed, assert_linear_is_fixed, assert_lora_is_fixed, fixed_sums

from lora_kernels.ops import Impl

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_the_same_bits_beside_others(native: Impl, dtype: torch.dtype) -> None:
    with fixed_sums():
        assert_linear_is_fixed(native, dtype)
        assert_lora_is_fixed(native, dtype)
        assert_lora_is_fixed(native, dtype, int8=True)
        for window in (0, 70):
            for kv_len in (40, 1100):
                assert_attention_is_fixed(native, dtype, kv_len, window)


def test_without_it_they_need_not(native: Impl) -> None:
    with pytest.raises(AssertionError):
        assert_attention_is_fixed(native, torch.float32, 1100, 0)
