"""The threads that share an operation's tasks: nothing is left out or done twice, whoever else computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from lora_kernels import ops
from lora_kernels.ops import Impl

BF16 = torch.bfloat16


@pytest.fixture(params=[1, 2, 7])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def case(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, 64, generator=generator), torch.randn(1000, 64, generator=generator)
    return x.to(BF16), weight.to(BF16), (x.to(BF16).double() @ weight.to(BF16).double().T)


def check(x: torch.Tensor, packed: ops.PackedLinear, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ops.linear(x, packed, impl="cpu").double(), expected, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("rows", [1, 40])
def test_more_threads_than_cores_and_than_tasks(native: Impl, num_threads: int, rows: int) -> None:
    del native, num_threads
    x, weight, expected = case(0, rows)
    for width in (32, 64, 1000):  # 1, 2 and 32 tasks
        # A check takes long enough for helpers to go to sleep; the operation must wake them.
        packed = ops.pack_linear(weight[:width], impl="cpu")
        for _ in range(200):
            check(x, packed, expected[:, :width])


def test_several_threads_compute_at_once(native: Impl, num_threads: int) -> None:
    """The second caller finds the team busy and does its own work."""
    del native
    failed: list[BaseException] = []
    start = threading.Barrier(4)

    def compute(seed: int) -> None:
        try:
            torch.set_num_threads(num_threads)
            x, weight, expected = case(seed, 5)
            packed = ops.pack_linear(weight, impl="cpu")
            start.wait(timeout=60)
            for _ in range(300):
                check(x, packed, expected)
        except BaseException as error:  # noqa: BLE001 - told by the test's own thread
            failed.append(error)

    threads = [threading.Thread(target=compute, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
