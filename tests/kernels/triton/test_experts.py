"""LoRA on experts, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from helpers.expert_cases import expert_case
from helpers.kernel_cases import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 6), (30, 6), (70, 2)])
def test_pairs_of_adapters_of_several_ranks(num_tokens: int, num_experts: int, dtype: torch.dtype) -> None:
    """Small tiles, and large ones where an expert has many rows."""
    case = expert_case(num_tokens, [16, 3, 0, 40], num_experts=num_experts, dtype=dtype)
    case.slots[-1] = 3
    expected = case.expected()
    assert expected.abs().max() > 0.1
    assert_close(case.run("triton"), expected)
