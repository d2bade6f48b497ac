"""The threads that share an operation's tasks: each task runs exactly once, whatever else computes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.waiting import wait_until

from lora_kernels import cpu, ops
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


@pytest.mark.parametrize("rows", [1, pytest.param(40, marks=pytest.mark.thorough)])
def test_more_threads_than_cores_and_than_tasks(native: Impl, num_threads: int, rows: int) -> None:
    del native, num_threads
    x, weight, expected = case(0, rows)
    for width in (32, 64, 1000):  # 1, 2 and 32 tasks
        # A check takes so long that helpers go to sleep; the operation must wake them.
        packed = ops.pack_linear(weight[:width], impl="cpu")
        for _ in range(200):
            check(x, packed, expected[:, :width])


def test_several_threads_compute_at_once(native: Impl, num_threads: int) -> None:
    """A second caller finds the team busy and runs its tasks itself."""
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


# ------------------------------------------------------------ on which cores they run

HELPED = """
import os, sys, threading
import torch
from lora_kernels import ops

torch.set_num_threads(2)
x, weight = torch.randn(64, 512).bfloat16(), torch.randn(8192, 512).bfloat16()
packed = ops.pack_linear(weight, impl="cpu")
expected = ops.linear(x, packed, impl="cpu")
print(threading.get_native_id(), flush=True)
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0))).start()
while True:
    assert torch.equal(ops.linear(x, packed, impl="cpu"), expected)
"""
"""A program that computes with one helper until its input ends. Prints the id of the thread that calls operations."""


@pytest.fixture
def cores() -> list[int]:
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2 or not cpu.load():
        pytest.skip("two cores of a Linux machine and the native kernels are needed")
    return sorted(os.sched_getaffinity(0))


@contextmanager
def computing(cores: list[int]) -> Iterator[tuple[int, int]]:
    """Run `HELPED` on two cores. Yield its process id and the id of its calling thread."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", HELPED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, cores[:2]),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
        assert process.poll() is None, "it computed something wrong"
        process.communicate()


def core_of(thread: int) -> int:
    """Return the core on which a thread runs, or last ran."""
    return int(Path(f"/proc/{thread}/stat").read_text().rpartition(")")[2].split()[36])


def is_kept(pid: int, caller: int, helper_on: set[int], caller_on: int) -> bool:
    """Return whether a helper is limited to `helper_on` while its caller runs on `caller_on`."""
    before = core_of(caller)
    threads = [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]
    seen = helper_on in [os.sched_getaffinity(thread) for thread in threads if thread != caller]
    return seen and before == core_of(caller) == caller_on


@pytest.mark.timeout(240)
async def test_helpers_keep_off_the_callers_core(cores: list[int]) -> None:
    both = set(cores[:2])
    with computing(cores) as (pid, caller):

        def is_followed(core: int) -> bool:
            os.sched_setaffinity(caller, {core})
            os.sched_setaffinity(caller, both)
            return any(is_kept(pid, caller, both - {core}, core) for _ in range(200))

        for core in cores[:2]:
            await wait_until(partial(is_followed, core), f"helpers keep off core {core}", timeout_s=100)
        assert os.sched_getaffinity(caller) == both


def test_a_helper_that_waits_for_a_core_is_given_the_callers(tmp_path: Path) -> None:
    """A helper that already has a core keeps it."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("a compiler and Linux are needed")
    program, sources = tmp_path / "helper_cores", Path(cpu.__file__).with_name("csrc")
    source = Path(__file__).with_name("helper_cores.cpp")
    subprocess.run(
        [compiler, "-std=c++20", "-O2", "-pthread", f"-I{sources}", source, "-lstdc++", "-o", program], check=True
    )
    code = subprocess.run([program], check=False, timeout=200).returncode
    if code == 77:
        pytest.skip("two cores are needed")
    assert code == 0
