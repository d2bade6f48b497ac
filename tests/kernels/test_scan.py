"""Selective scans against the recurrence written out and against transformers, in parts, and at extreme values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.kernel_cases import assert_close, randn
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from lora_kernels import ops
from lora_kernels.ops import Impl
from lora_kernels.triton_ops.scan import CHUNK_TOKENS
from lora_kernels.triton_ops.scan import selective_scan as by_doubling

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 8, 16), (3, 33, 5), (CHUNK_TOKENS + 7, 70, 16)]
"""Tokens, channels, state size."""

Scan = Callable[..., Tensor]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    num_tokens, num_channels, num_states = shape
    of_token, of_state = (num_tokens, num_channels), (num_tokens, num_states)
    return {
        "x": randn(*of_token, dtype=dtype), "dt": randn(*of_token, seed=1) - 1,
        "a": -torch.exp(randn(num_channels, num_states, seed=2)),
        "b": randn(*of_state, dtype=dtype, seed=3), "c": randn(*of_state, dtype=dtype, seed=4),
        "skip": randn(num_channels, seed=5), "gate": randn(*of_token, dtype=dtype, seed=6),
        "dt_bias": randn(num_channels, seed=7),
    }  # fmt: skip


def written_out(given: dict[str, Tensor], state: Tensor) -> Tensor:
    """Return the output [T, C] in double precision, computed token by token; updates `state` [C, N]."""
    x, dt, a, b, c, skip, gate, bias = (value.double() for value in given.values())
    out = torch.zeros_like(x)
    for t in range(len(x)):
        step = torch.log1p(torch.exp(dt[t] + bias))
        state[:] = torch.exp(step[:, None] * a) * state + (step * x[t])[:, None] * b[t]
        out[t] = (state @ c[t] + skip * x[t]) * gate[t] / (1 + torch.exp(-gate[t]))
    return out


@pytest.fixture
def scan(impl: Impl) -> Scan:
    return lambda **given: ops.selective_scan(**given, softplus=True, impl=impl)


def doubled(**given: Tensor) -> Tensor:
    return by_doubling(**given, softplus=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_scan_is_the_recurrence(shape: tuple[int, int, int], dtype: torch.dtype, scan: Scan) -> None:
    given, begin = inputs(shape, dtype), randn(*shape[1:], seed=8)
    expected_state = begin.double()
    expected = written_out(given, expected_state)
    for found in (scan, doubled):
        state = begin.clone()
        assert_close(found(**given, state=state), expected, dtype)
        assert_close(state, expected_state)
    assert not torch.allclose(scan(**given, state=torch.zeros_like(begin)).double(), expected)


def test_a_scan_is_transformers(scan: Scan) -> None:
    given, state = inputs((20, 33, 16)), torch.zeros(33, 16)
    x, dt, a, b, c, skip, gate, bias = given.values()
    columns = [value.T[None] for value in (x, dt, b, c, gate)]
    theirs, left = mamba_selective_scan(
        columns[0], columns[1], a, columns[2], columns[3], D=skip, z=columns[4], delta_bias=bias, delta_softplus=True,
        return_last_state=True,
    )  # fmt: skip
    assert_close(scan(**given, state=state), theirs[0].T)
    assert_close(state, left[0])


def test_a_scan_in_parts_goes_on_where_it_was(scan: Scan) -> None:
    given, state = inputs((CHUNK_TOKENS + 9, 40, 16)), torch.zeros(40, 16)
    whole = scan(**given, state=state)
    of_token = ("x", "dt", "b", "c", "gate")
    for found in (scan, doubled):
        again, parts = torch.zeros(40, 16), []
        for part in (slice(0, 1), slice(1, 30), slice(30, None)):
            cut = {name: value[part] if name in of_token else value for name, value in given.items()}
            parts.append(found(**cut, state=again))
        assert_close(torch.cat(parts), whole)
        assert_close(again, state)


def test_steps_are_right_far_out(scan: Scan) -> None:
    """Where softplus or the decay underflows, overflows, or dominates the result."""
    dt = torch.tensor([[-200.0, -50.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 88.0, 200.0, 1e4]])
    ones, none = torch.ones(1, 10), torch.zeros(10)
    given = {"x": ones, "dt": dt, "a": -torch.ones(10, 1), "b": torch.ones(1, 1), "c": torch.ones(1, 1)}
    state = torch.ones(10, 1)
    out = scan(**given, skip=none, gate=ones, dt_bias=none, state=state)
    step = torch.nn.functional.softplus(dt.double())
    expected = torch.exp(-step) + step
    torch.testing.assert_close(state.T.double(), expected, rtol=2e-6, atol=1e-30)
    torch.testing.assert_close(out.double(), expected * torch.sigmoid(torch.ones(1).double()), rtol=2e-6, atol=1e-30)


def test_a_scan_without_its_options(impl: Impl) -> None:
    given = inputs((9, 20, 4))
    plain: Any = {name: given[name] for name in ("x", "dt", "a", "b", "c")}
    whole: Any = {**given, "skip": torch.zeros(20), "dt_bias": torch.zeros(20)}
    whole["gate"] = torch.full_like(given["gate"], 60.0)  # silu(60) is 60
    first, second = torch.zeros(20, 4), torch.zeros(20, 4)
    out = ops.selective_scan(**plain, state=first, impl=impl)
    assert_close(ops.selective_scan(**whole, state=second, impl=impl) / 60, out)
    assert_close(first, second)


def test_columns_of_one_projection_are_scanned(impl: Impl) -> None:
    given, fused = inputs((9, 20, 4)), randn(9, 60, seed=9)
    apart = {**given, "x": fused[:, :20], "gate": fused[:, 30:50]}
    together = {**apart, "x": fused[:, :20].contiguous(), "gate": fused[:, 30:50].contiguous()}
    first, second = torch.zeros(20, 4), torch.zeros(20, 4)
    out = ops.selective_scan(**apart, state=first, softplus=True, impl=impl)
    assert_close(ops.selective_scan(**together, state=second, softplus=True, impl=impl), out)
    assert_close(first, second)
