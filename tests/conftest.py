"""Fixtures and rules for all tests: a real queue server per test process, time limits, and the seed of the order.

After each test, every key of the queue must have a TTL or be on the permanent list.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpcore2
import hypothesis
import pytest
import pytest_asyncio
from helpers import examples

from lorafleet.launcher.embedded import EmbeddedServer, start_embedded
from protocol.queue.bus import Bus

TESTS = Path(__file__).parent
LONGER_S: dict[str, int] = {
    "chaos": 120,  # whole fleets
    "e2e": 120,  # whole fleets
    "e2e/test_workers.py": 240,  # three rounds of 6,400 tokens in one test
    "gateway/adapters": 60,  # real stores
    "gateway/batches/test_trouble.py": 60,  # every step of a batch fails once
    "gateway/test_loop_lag.py": 120,  # bodies of 4 MB
    "gateway/http": 120,  # hypothesis; hundreds of clients
    "benchmarks/test_gpu.py": 60,  # every benchmark begins
    "gpu_worker": 120,  # engines are built
    "hostile": 240,  # a whole fleet under attack; fuzzing
    "kernels/test_triton.py": 600,  # a whole test run in Triton's interpreter; compilations for three cards
    "kernels/triton": 120,  # that run
    "lorafleet/test_fetch.py": 60,  # reads GGUF files in processes of their own
    "lorafleet/test_profile.py": 60,
    "lorafleet/test_quickstart.py": 120,  # converts a model
    "oracle": 120,  # models of transformers
    "oracle/test_greedy.py": 240,  # a model of real size
    "peft_adapters": 120,  # hypothesis; PEFT's own models
    "protocol/queue/test_interleavings.py": 300,  # every order of events
    "protocol/queue/test_lost_tail.py": 300,  # every order of events
    "scheduler": 120,  # hypothesis; fleets in virtual time
    "test_packaging.py": 120,  # imports everything in new interpreters
}
"""File or folder -> time limit of each test on two busy cores, s. Files with higher limits run first."""


THOROUGH = (
    "adapter_store/test_kill.py",
    "benchmarks/test_gpu.py",
    "e2e/test_adapters.py",
    "e2e/test_at_rest.py",
    "e2e/test_bases.py",
    "e2e/test_encoders.py",
    "e2e/test_network.py",
    "e2e/test_observed.py",
    "e2e/test_pooled.py",
    "e2e/test_reliability.py",
    "e2e/test_swaps.py",
    "e2e/test_terminal.py",
    "e2e/test_traces.py",
    "e2e/test_workers.py",
    "examples/test_tours.py",
    "gateway/text/test_families.py",
    "gpu_worker/cuda/test_warm_up.py",
    "gpu_worker/test_light_imports.py",
    "hostile/test_hostile.py",
    "kernels/test_triton.py",
    "lorafleet/test_fetch.py",
    "lorafleet/test_quickstart.py",
    "oracle/adapters/test_expert_rows.py",
    "oracle/adapters/test_kind_forms.py",
    "oracle/test_architectures.py",
    "oracle/test_compiled.py",
    "oracle/test_encoder_types.py",
    "oracle/test_graphs.py",
    "oracle/test_greedy.py",
    "oracle/test_models.py",
    "oracle/test_one_by_one.py",
    "oracle/test_states.py",
    "oracle/test_step_limit.py",
    "protocol/queue/connection/test_failover.py",
    "protocol/queue/test_interleavings.py",
    "protocol/queue/test_lost_tail.py",
)
"""Files that run only with `make test-all` or when named on the command line: long tests of facts that other tests
check too. Single tests of this kind are marked `thorough`; `helpers/examples.py` sets how many examples hypothesis
draws."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that `make test-all` uses."""
    parser.addoption("--thorough", action="store_true", help="also run the long tests (THOROUGH in tests/conftest.py)")


def is_thorough(config: pytest.Config) -> bool:
    """Return whether long tests are wanted: with `--thorough`, or if files are named on the command line."""
    told: dict[str, bool] = getattr(config, "workerinput", {})  # set by xdist, whose processes have other arguments
    is_named = config.args_source is pytest.Config.ArgsSource.ARGS
    return told.get("thorough", config.getoption("--thorough") or is_named)


class TellWorkers:
    """Passes on to xdist's processes whether long tests are wanted."""

    def pytest_configure_node(self, node: Any) -> None:
        """Store the flag where `is_thorough` reads it."""
        node.workerinput["thorough"] = is_thorough(node.config)


def pytest_configure(config: pytest.Config) -> None:
    """Avoid work that takes much time in every process without testing anything.

    Garbage collection is off during the import of tests, where it takes half the time. Certificates are read once
    instead of by every HTTP client. `jsonschema` does not build the grammars of IRIs, which no schema here needs.
    """
    # No test may find a fleet of this user, or of another test process, by the record that the fleet leaves.
    os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="lorafleet-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_RUNTIME_DIR"], ignore_errors=True)
    if config.pluginmanager.has_plugin("dsession"):
        config.pluginmanager.register(TellWorkers())
    examples.are_many = is_thorough(config)
    slow = [hypothesis.HealthCheck.too_slow]  # no test asserts a time
    hypothesis.settings.register_profile(
        "some", max_examples=examples.of(100), deadline=None, suppress_health_check=slow
    )
    hypothesis.settings.load_profile("some")
    gc.disable()
    httpcore2.default_ssl_context = cache(httpcore2.default_ssl_context)
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]  # makes its import fail
    atexit.register(gc.unfreeze)  # otherwise C++ libraries report leaks at exit


def pytest_collection_finish() -> None:
    """Exclude all imported objects from later garbage collections."""
    gc.enable()
    gc.freeze()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignore the files of THOROUGH, which are not even imported."""
    is_left_out = collection_path.is_relative_to(TESTS) and _name(collection_path) in THOROUGH
    return True if is_left_out and not is_thorough(config) else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests marked `thorough`, set the limits of LONGER_S, and sort by descending limit.

    A marker of a test overrides LONGER_S. xdist's processes take files in this order, so that no long file starts when
    the others have ended.
    """
    missing = [name for name in (*LONGER_S, *THOROUGH) if not (TESTS / name).exists()]
    if missing:
        raise pytest.UsageError(f"tests/conftest.py names files that do not exist: {', '.join(missing)}")
    if not is_thorough(config):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
    for item in items:
        limit_s = _limit_s(item.path)
        if limit_s > (config.getoption("timeout") or 0) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(limit_s))
    items.sort(key=lambda item: _limit_s(item.path), reverse=True)


def _name(path: Path) -> str:
    return path.relative_to(TESTS).as_posix()


@cache
def _limit_s(path: Path) -> int:
    """Return the limit in s that LONGER_S sets for a file's tests; 0: none."""
    name = _name(path)
    return max(
        (limit for prefix, limit in LONGER_S.items() if name == prefix or name.startswith(f"{prefix}/")), default=0
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the seed of the random order if a test failed."""
    seed = config.getoption("randomly_seed", default=None)
    if seed is not None and terminalreporter.stats.keys() & {"failed", "error"}:
        terminalreporter.write_line(f"the same order again: --randomly-seed={seed}")


@pytest.fixture(scope="session")
def queue_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A queue server shared by all tests of this process."""
    server = start_embedded(Path(tmp_path_factory.mktemp("queue")), durable=False)
    yield server
    server.stop()


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A queue server of the test alone, which keeps what it has on the disk."""
    server = start_embedded(tmp_path / "durable")
    yield server
    server.stop()


@pytest_asyncio.fixture
async def bus(queue_server: EmbeddedServer) -> AsyncIterator[Bus]:
    """A client on an empty queue. After the test, every key must have a TTL or be on the permanent list."""
    client = Bus(queue_server.url)
    await client._redis.flushall()
    yield client
    leaks = await client.untimed_keys()
    await client.close()
    assert not leaks, f"keys left without a TTL: {leaks}"
