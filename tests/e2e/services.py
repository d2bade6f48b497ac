"""A fleet of real processes, one `lorafleet serve` each, that a test may start and kill one by one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
from waiting import wait_until

from lorafleet.embedded import EmbeddedServer, start_embedded
from protocol.bus import Bus
from protocol.settings import Settings


class Services:
    """The processes of one fleet, their logs in `folder`."""

    def __init__(self, folder: Path, model: Path, adapters: Path, **settings: object) -> None:
        self.folder = folder
        self.queue: EmbeddedServer = start_embedded(folder / "queue", durable=False)
        self.bus = Bus(self.queue.url)
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._settings = Settings.model_validate(
            {
                "redis_url": self.queue.url, "model": str(model), "adapters": adapters, "data": folder / "data",
                "port": self.port, "device": "cpu", "dtype": "float32", "threads": 1, "kv_cache_bytes": 64 << 20,
                "adapter_pool_bytes": 64 << 20, "adapter_host_bytes": 64 << 20, **settings,
            }
        )  # fmt: skip

    def start(self, service: str, name: str = "") -> subprocess.Popen[bytes]:
        """Start a service; `name` tells several of a kind apart."""
        name = name or service
        environment = os.environ | self._settings.model_copy(update={"worker_name": name}).environment()
        command = [sys.executable, "-m", "lorafleet", "serve", service]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.processes[name] = process
        return process

    def kill(self, name: str) -> None:
        """End a service as a crash would."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    async def start_all(self, *workers: str) -> None:
        """Start one of each service and the named workers; wait until the gateway says it can answer."""
        for service in ("store", "scheduler", "gateway"):
            self.start(service)
        for name in workers:
            self.start("worker", name)
        async with httpx2.AsyncClient() as http:
            await wait_until(lambda: self._is_healthy(http), "the fleet is healthy", timeout_s=100, every_s=0.1)
        await wait_until(lambda: self.num_workers(len(workers)), "all workers have joined", timeout_s=60)

    async def num_workers(self, num: int) -> bool:
        return sum(beat is not None for beat in (await self.bus.worker_beats()).values()) == num

    async def _is_healthy(self, http: httpx2.AsyncClient) -> bool:
        for name, process in self.processes.items():
            assert process.poll() is None, f"{name} ended: {(self.folder / f'{name}.log').read_text()[-2000:]}"
        with contextlib.suppress(httpx2.TransportError):
            return (await http.get(f"{self.url}/health")).status_code == 200
        return False

    async def close(self) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait()
        await self.bus.close()
        self.queue.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
