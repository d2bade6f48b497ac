"""A service process is restarted, drained, killed with its descendants, and never outlives its launcher."""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from helpers.processes import is_running, read_pid
from helpers.waiting import wait_until

from lorafleet.launcher.child import MAX_FAILED_STARTS, MAX_LOG_BYTES, Child, ServiceFailed, Spec
from protocol.runtime.service import JsonLines

ROOT = Path(__file__).parents[2]
WRITE_PID = "import os, pathlib, sys; pathlib.Path('pid').write_text(f'{os.getpid()}\\n');"
RUN = f"{WRITE_PID} import signal; signal.pause()"
WITH_GRANDCHILD = (
    "import subprocess, sys;"
    "from lorafleet.launcher.lifeline import hold_lifeline; hold_lifeline();"
    f"subprocess.Popen([sys.executable, '-c', {RUN!r}]).wait()"
)


@pytest.fixture
def lifeline() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    for fd in (reading, writing):
        with suppress(OSError):  # a test may have closed it
            os.close(fd)


@pytest.fixture(autouse=True)
def in_own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def make_child(
    code: str, folder: Path, lifeline_fd: int, said: list[str] | None = None, max_log_bytes: int = MAX_LOG_BYTES
) -> Child:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    spec = Spec("worker", "worker-0", (sys.executable, "-c", code), environment, folder / "worker-0.log")
    return Child(
        spec, lifeline_fd, (said if said is not None else []).append, first_pause_s=0.01, max_log_bytes=max_log_bytes
    )


@asynccontextmanager
async def supervised(child: Child) -> AsyncIterator[asyncio.Task[None]]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(child.supervise())
        try:
            yield task
        finally:
            child.kill()


async def test_a_killed_process_is_started_again(tmp_path: Path, lifeline: tuple[int, int]) -> None:
    said: list[str] = []
    child = make_child(RUN, tmp_path, lifeline[0], said)
    async with supervised(child):
        first = await wait_until(lambda: read_pid(tmp_path / "pid"), "it runs")
        child.ready.set()
        os.kill(first, signal.SIGKILL)
        second = await wait_until(lambda: (p := read_pid(tmp_path / "pid")) != first and p, "its successor runs")
        assert is_running(second)
        assert not child.ready.is_set()
    assert any("SIGKILL" in line for line in said)


async def test_a_process_that_never_gets_ready_is_given_up_with_its_log(
    tmp_path: Path, lifeline: tuple[int, int]
) -> None:
    code = "import sys; open('starts', 'a').write('x'); sys.exit('the disk is on fire')"
    child = make_child(code, tmp_path, lifeline[0])
    with pytest.raises(ServiceFailed, match=r"(?s)worker-0 did not start \(ended with exit code 1\).*disk is on fire"):
        await child.supervise()
    assert len((tmp_path / "starts").read_text()) == MAX_FAILED_STARTS


async def test_wrong_settings_are_not_tried_twice(tmp_path: Path, lifeline: tuple[int, int]) -> None:
    child = make_child("import sys; open('starts', 'a').write('x'); sys.exit(2)", tmp_path, lifeline[0])
    with pytest.raises(ServiceFailed, match="exit code 2"):
        await child.supervise()
    assert (tmp_path / "starts").read_text() == "x"


async def test_who_was_ready_once_is_never_given_up(tmp_path: Path, lifeline: tuple[int, int]) -> None:
    starts = tmp_path / "starts"
    starts.touch()
    child = make_child("open('starts', 'a').write('x')", tmp_path, lifeline[0])
    child.ready.set()
    more_than_a_newcomer = MAX_FAILED_STARTS + 2
    async with supervised(child):
        await wait_until(lambda: len(starts.read_text()) == more_than_a_newcomer, "it was started again and again")


async def test_stop_lets_it_drain(tmp_path: Path, lifeline: tuple[int, int]) -> None:
    code = f"import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('drained'))); {RUN}"
    child = make_child(code, tmp_path, lifeline[0])
    async with supervised(child) as life:
        await wait_until(lambda: read_pid(tmp_path / "pid"), "it runs")
        await child.stop(60)
        assert not is_running(read_pid(tmp_path / "pid"))
        await life  # no successor
    assert "drained" in (tmp_path / "worker-0.log").read_text()


async def test_stop_kills_what_does_not_drain(tmp_path: Path, lifeline: tuple[int, int]) -> None:
    said: list[str] = []
    code = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {RUN}"
    child = make_child(code, tmp_path, lifeline[0], said)
    async with supervised(child):
        pid = await wait_until(lambda: read_pid(tmp_path / "pid"), "it runs")
        await child.stop(0.05)
        assert not is_running(pid)
    assert any("did not drain" in line for line in said)


async def test_killing_reaches_grandchildren(tmp_path: Path, lifeline: tuple[int, int]) -> None:
    child = make_child(WITH_GRANDCHILD, tmp_path, lifeline[0])
    async with supervised(child):
        grandchild = await wait_until(lambda: read_pid(tmp_path / "pid"), "the grandchild runs")
        child.kill()
        await wait_until(lambda: not is_running(grandchild), "it is gone")


async def test_the_end_of_the_lifeline_reaches_grandchildren(tmp_path: Path, lifeline: tuple[int, int]) -> None:
    child = make_child(WITH_GRANDCHILD, tmp_path, lifeline[0])
    async with supervised(child) as life:
        grandchild = await wait_until(lambda: read_pid(tmp_path / "pid"), "the grandchild runs")
        child._stopping.set()  # no successor
        os.close(lifeline[1])
        await life
        await wait_until(lambda: not is_running(grandchild), "it is gone")


async def test_warnings_are_shown_and_the_last_line_tells_what_it_does(
    tmp_path: Path, lifeline: tuple[int, int]
) -> None:
    said: list[str] = []
    child = make_child("", tmp_path, lifeline[0], said)
    log = tmp_path / "worker-0.log"
    log.write_text("12:00:00 I worker gpu_worker.engine: loading\n12:00:01 W worker gpu_worker.pool: [low] memory\nhal")
    child.follow_log()
    assert said == [r"[yellow]worker-0[/] \[low] memory"]
    assert child.activity == "[low] memory"
    with log.open("a") as more:
        more.write("f a line\rLoading weights:  50%\r")
    child.follow_log()
    assert child.activity == "Loading weights:  50%"
    assert len(said) == 1
    try:
        raise ValueError("ü")
    except ValueError as error:
        fields = ("a.b", logging.ERROR, "", 1, "low %s", ("disk",), (type(error), error, error.__traceback__))
    line = JsonLines("worker").format(logging.LogRecord(*fields))
    with log.open("a") as more:
        more.write(f"{line}\n")
    child.follow_log()
    assert (child.activity, len(said)) == ("low disk", 2)
    entry = json.loads(line)
    assert (entry["level"], entry["service"], entry["logger"]) == ("error", "worker", "a.b")
    assert entry["exception"].endswith("ValueError: ü")


async def test_no_line_of_a_log_ends_the_launcher(tmp_path: Path, lifeline: tuple[int, int]) -> None:
    said: list[str] = []
    child = make_child("", tmp_path, lifeline[0], said)
    log = tmp_path / "worker-0.log"
    odd = 'the tensor "a\u2028b\u2029c\x85d\x0b\x1c" is unknown'
    entry = json.dumps({"time": "12", "level": "warning", "message": odd}, ensure_ascii=False)
    log.write_text(f"{entry}\n")
    child.follow_log()
    assert (child.activity, len(said)) == (odd, 1)
    for line in ('{"time": ', '{"time": 1}', '{"time": 1, "level": 7, "message": []}', '{"time": [', "\x85", "\u2028"):
        with log.open("a") as more:
            more.write(f"{line}\n")
        child.follow_log()
    assert len(said) == 1
    assert len(child.log_tail().split("\n")) == 7


LOUD = """
import pathlib, time
for number in range(300):
    print("%03d" % number, "x" * 95, flush=True)
pathlib.Path(DONE).touch()
time.sleep(60)
"""


async def test_a_log_begins_again_before_it_fills_the_disk(tmp_path: Path, lifeline: tuple[int, int]) -> None:
    child = make_child(f"DONE = {str(tmp_path / 'done')!r}\n{LOUD}", tmp_path, lifeline[0], max_log_bytes=10_000)
    log, older = tmp_path / "worker-0.log", tmp_path / "worker-0.log.1"
    async with supervised(child):
        await wait_until((tmp_path / "done").exists, "it has said everything")
        child.follow_log()
        assert (log.stat().st_size, older.stat().st_size) == (0, 30_000)
        assert older.read_text().startswith("000 ")
        with log.open("ab") as more:  # as the process does, which appends
            more.write(b"12:00:00 I worker a.b: on\n")
        child.follow_log()
        assert child.activity == "on"
        assert log.read_bytes() == b"12:00:00 I worker a.b: on\n"


async def test_a_log_that_cannot_be_kept_begins_again_all_the_same(tmp_path: Path, lifeline: tuple[int, int]) -> None:
    said: list[str] = []
    child = make_child("", tmp_path, lifeline[0], said, max_log_bytes=10)
    (tmp_path / "worker-0.log.1").mkdir()
    log = tmp_path / "worker-0.log"
    log.write_text("more than ten bytes\n")
    child.follow_log()
    assert log.stat().st_size == 0
    assert "could not be rotated" in said[0]
