"""The loader process: if it or the worker dies, nothing hangs and no process or file is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler

import psutil
import pytest
from helpers.processes import is_running
from helpers.stub_http import serving

from gpu_worker.adapters.loader.client import MAX_DEATHS, Loader
from gpu_worker.adapters.loader.fetch import FetchedAdapter
from gpu_worker.adapters.packing.rows import PackedRows
from protocol.wire.errors import Internal, LorafleetError, NotFound, Unavailable

DIGEST = "0" * 64


class SlowStore:
    """A store that records every request and answers 404 once `answers` is set."""

    def __init__(self) -> None:
        self.url = ""
        self.asked = threading.Semaphore(0)
        self.answers = threading.Event()
        store = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                store.asked.release()
                assert store.answers.wait(60)
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                return

        self.handler = Handler


@pytest.fixture
def store() -> Iterator[SlowStore]:
    store = SlowStore()
    with serving(store.handler) as store.url:
        yield store
        store.answers.set()


@pytest.fixture
def loader(store: SlowStore) -> Iterator[Loader]:
    loader = Loader()
    loader.set_urls((store.url,))
    yield loader
    loader.close()


def fetch(loader: Loader) -> Future[FetchedAdapter | PackedRows]:
    future: Future[FetchedAdapter | PackedRows] = Future()

    def run() -> None:
        try:
            future.set_result(loader.fetch(DIGEST))
        except LorafleetError as error:
            future.set_exception(error)

    threading.Thread(target=run).start()
    return future


def test_a_loader_that_dies_is_started_and_asked_again(loader: Loader, store: SlowStore) -> None:
    answer = fetch(loader)
    assert store.asked.acquire(timeout=60)
    first = loader.pid
    os.kill(first, signal.SIGKILL)
    assert store.asked.acquire(timeout=60)
    assert loader.pid != first
    store.answers.set()
    with pytest.raises(NotFound):
        answer.result(60)


def test_an_adapter_under_which_loaders_die_is_given_up(loader: Loader, store: SlowStore) -> None:
    answer = fetch(loader)
    for _ in range(MAX_DEATHS):
        assert store.asked.acquire(timeout=60)
        os.kill(loader.pid, signal.SIGKILL)
    with pytest.raises(Internal, match=f"died {MAX_DEATHS} times"):
        answer.result(60)
    store.answers.set()
    with pytest.raises(NotFound):
        loader.fetch(DIGEST)


def test_signals_to_the_group_leave_it_to_the_worker(loader: Loader, store: SlowStore) -> None:
    answer = fetch(loader)
    assert store.asked.acquire(timeout=60)
    pid = loader.pid
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    store.answers.set()
    with pytest.raises(NotFound):
        answer.result(60)
    assert loader.pid == pid


def test_closing_ends_the_process_and_every_fetch(loader: Loader, store: SlowStore) -> None:
    answer = fetch(loader)
    assert store.asked.acquire(timeout=60)
    pid = loader.pid
    loader.close()
    with pytest.raises(Unavailable, match="stopping"):
        answer.result(60)
    assert not psutil.pid_exists(pid)


def test_the_process_ends_with_its_worker(store: SlowStore) -> None:
    code = f"""
from gpu_worker.adapters.loader.client import Loader
loader = Loader()
loader.set_urls(({store.url!r},))
print(loader.pid, flush=True)
loader.fetch({DIGEST!r})
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        loader = psutil.Process(int(worker.stdout.readline()))
        assert store.asked.acquire(timeout=60)
        processes = [loader, *loader.children()]
        assert len(processes) == 1 + (sys.platform == "linux"), "it has one that makes memory"
        worker.kill()
    psutil.wait_procs(processes, timeout=60)
    assert not any(is_running(process.pid) for process in processes)
