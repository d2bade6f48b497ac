"""Real fleets for tests: `lorafleet up` in its own process, and functions to call, watch and stop it."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import orjson
import psutil

from chaos.fleet import ProcessFleet, Shape, free_port
from helpers.factories import make_adapter, make_tiny_model
from helpers.preloaded import fork
from helpers.processes import with_variable, working_below
from helpers.waiting import wait_until
from lorafleet.launcher.machine import claim_port
from lorafleet.launcher.queue_users import password_file
from protocol.runtime.settings import Settings
from protocol.wire.errors import Conflict

MARKER = "PYTHON_TEST_FLEET_MARKER"
"""Its prefix makes the launcher pass it to the services, which get only the variables that they need."""

QUICK = ("--device", "cpu", "--dtype", "float32", "--kernels", "reference", "--grace-s", "20")


@dataclass
class RunningFleet:
    """A `lorafleet up` process, with its port and output."""

    process: subprocess.Popen[bytes]
    marker: str
    port: int
    output_file: Path
    more: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        return self.output_file.read_text()

    def door(self, user: str) -> Settings:
        """Return the settings of a user of the embedded queue, once the launcher has printed the queue's address."""
        found = re.search(r"unix://(\S+)", self.output)
        assert found is not None, self.output
        (users,) = self.output_file.parent.glob("data/queue/*/users")
        return Settings(redis_url=f"unix://{user}@{found[1]}", redis_password_file=password_file(users, user))

    def is_ready(self) -> bool:
        """Return whether the launcher has announced the fleet. Raises AssertionError if it has ended."""
        assert self.process.poll() is None, self.output
        return "ready http://" in self.output

    def has_ended(self) -> bool:
        """Return whether the launcher has ended."""
        return self.process.poll() is not None

    def left_running(self) -> list[psutil.Process]:
        """Return the running processes of the fleet: launcher, services, their children, and the queue server."""
        # The queue server overwrites its environment with its process title, but it runs in its own folder.
        return [*with_variable(MARKER, self.marker), *working_below(self.output_file.parent / "data")]

    def worker(self, name: str) -> psutil.Process:
        """Return a worker's process."""
        (found,) = (process for process in self.left_running() if _is_worker(process, name))
        return found

    def port_is_free(self) -> bool:
        """Return whether another process could now listen on the port."""
        try:
            return claim_port("127.0.0.1", self.port) == self.port
        except Conflict:
            return False

    def is_gone(self) -> bool:
        """Return whether no process is left and the port is free."""
        return not self.left_running() and self.port_is_free()

    def client(self) -> httpx2.AsyncClient:
        """Return a client for the fleet's gateway."""
        return httpx2.AsyncClient(base_url=self.url, timeout=60, trust_env=False)

    def add_worker(self, model: Path, name: str, folder: Path) -> None:
        """Start another worker, as a user on this machine would."""
        command = [sys.executable, "-m", "lorafleet", "serve", "worker", "--model", str(model), "--worker-name", name]
        door = self.door("worker")
        environment = {**os.environ, MARKER: self.marker, "REDIS_URL": door.redis_url}
        environment["LORAFLEET_REDIS_PASSWORD_FILE"] = str(door.redis_password_file)
        environment["LORAFLEET_SECRET_FILE"] = str(self.output_file.parent / "data" / "secret")
        with (folder / f"{name}.log").open("wb") as log:
            self.more.append(subprocess.Popen([*command, *QUICK], env=environment, stdout=log, stderr=log))


@asynccontextmanager
async def tiny_fleet(folder: Path, adapters: Sequence[str]) -> AsyncIterator[ProcessFleet]:
    """Run a fleet of the tiny model in `folder/model` and of adapters in `folder/adapters`, seeded from 1 upwards."""
    model = make_tiny_model(folder / "model")
    for seed, name in enumerate(adapters, start=1):
        make_adapter(folder / "adapters" / name, model, seed=seed)
    async with services_of(folder, model) as fleet:
        yield fleet


@asynccontextmanager
async def services_of(folder: Path, model: Path, *workers: str) -> AsyncIterator[ProcessFleet]:
    """Run a fleet of a model and of the adapters in `folder/adapters`. workers: their names; (): one worker."""
    fleet = ProcessFleet.prepare(folder, model, folder / "adapters", durable=False, spawn=fork)
    try:
        await fleet.start_all(Shape(workers=workers) if workers else Shape())
        yield fleet
    finally:
        await fleet.close()


@asynccontextmanager
async def one_worker_dies(fleet: ProcessFleet) -> AsyncIterator[None]:
    """Suspend the workers during the block, which sends requests; then kill one that got some, and resume the others.

    A suspended worker cannot finish its requests before it is killed.
    """
    workers = [member.name for member in fleet.members.values() if member.service == "worker"]
    for name in workers:
        fleet.signal(name, signal.SIGSTOP)
    yield

    async def holder() -> str:
        for wid, beat in (await fleet.bus.members.worker_beats()).items():
            if beat is not None and await fleet.bus.work_of(wid):
                return beat.name
        return ""

    victim = await wait_until(holder, "a frozen worker has been given some of it")
    fleet.kill(victim)
    for name in workers:
        if name != victim:
            fleet.signal(name, signal.SIGCONT)


@contextmanager
def fleet_up(folder: Path, model: Path, *flags: str, further: Sequence[Path] = ()) -> Iterator[RunningFleet]:
    """Start `lorafleet up`; after the block, kill all its remaining processes. further: more base models."""
    folder.mkdir(parents=True, exist_ok=True)
    marker, port, output = secrets.token_hex(8), free_port(), folder / "output.txt"
    models = [str(one) for one in (model, *further)]
    command = [sys.executable, "-m", "lorafleet", "up", *models, "--port", str(port), "--data", str(folder / "data")]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("REDIS_URL", "LORAFLEET_REDIS_URL")
    }
    with output.open("wb") as out:
        process = subprocess.Popen(
            [*command, *QUICK, *flags], env={**environment, MARKER: marker}, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    fleet = RunningFleet(process, marker, port, output)
    try:
        yield fleet
    except BaseException as error:
        logs = [f"{log.name}:\n{log.read_text()[-2000:]}" for log in folder.glob("data/logs/*/*.log")]
        error.add_note("\n".join([fleet.output, *logs]))
        raise
    finally:
        for left in fleet.left_running():
            left.send_signal(signal.SIGKILL)
        for child in (process, *fleet.more):
            child.wait()


def completion(model: str, prompt: str, **more: Any) -> dict[str, Any]:
    """Return the body of a greedy completion that runs to its maximum length."""
    return {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **more}


async def chunks(response: httpx2.Response) -> AsyncIterator[str]:
    """Yield the texts of a streamed completion. Asserts that it ends by length and with [DONE]."""
    assert response.status_code == 200, await response.aread()
    finish = None
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            assert finish == "length"
            return
        if line.startswith("data: "):
            event = orjson.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            choice = event["choices"][0]
            finish = choice["finish_reason"] or finish
            yield choice["text"]
    raise AssertionError("the stream was cut off")


def _is_worker(process: psutil.Process, name: str) -> bool:
    command = process.cmdline()
    named = name in command or process.environ().get("LORAFLEET_WORKER_NAME") == name
    return named and {"serve", "worker"} <= set(command)
