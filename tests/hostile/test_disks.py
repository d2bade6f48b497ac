"""A tenant fills the disk of the queue's log: others still stream, the reserve stays free, and the tenant can delete.

The disk is real, a small file system in memory: neither the free space nor the queue server's behavior without space is
simulated.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio
from helpers.scripted_fleet import make_model_folder, playing, running_gateway
from helpers.waiting import wait_until

from lorafleet.launcher.embedded import EmbeddedServer, start_embedded
from protocol.queue.bus import Bus
from protocol.runtime.free_space import free_bytes

DISK_BYTES, KEEP_FREE = 40 << 20, 24 << 20
FORM_TYPE = "multipart/form-data; boundary=b0"
HEAD = (
    b'--b0\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--b0\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
)
END = b"\r\n--b0--\r\n"
FILE_BYTES = 2 << 20
NUM_ATTACKERS = 2


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    options = f"size={DISK_BYTES},mode=0700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def queue(disk: Path) -> Iterator[EmbeddedServer]:
    server = start_embedded(disk / "queue")
    yield server
    server.stop()


@pytest_asyncio.fixture
async def url(queue: EmbeddedServer, disk: Path, tmp_path: Path) -> AsyncIterator[str]:
    """A gateway whose files are on the queue's disk, and its fleet."""
    folder = make_model_folder(tmp_path / "model")
    bus = Bus(queue.url)
    async with (
        playing(queue.url, folder),
        running_gateway(bus, folder, data=disk, keep_free=KEEP_FREE, beat_timeout_s=60.0) as gateway,
    ):
        yield gateway.url
    await bus.close()


class Tenant:
    """Uploads files as fast as possible, some without a length, until one is refused for lack of space."""

    def __init__(self, http: httpx2.AsyncClient, disk: Path) -> None:
        self.http = http
        self.disk = disk
        self.told = Counter[tuple[int, str]]()
        self.ids: list[str] = []
        self.least_free = DISK_BYTES

    async def fill(self, number: int) -> None:
        while not self.told[507, "no_room"]:
            sized = HEAD + bytes(FILE_BYTES) + END
            body = sized if number % 2 else self._pieces()
            answer = await self.http.post("/v1/files", content=body, headers={"content-type": FORM_TYPE})
            self.least_free = min(self.least_free, free_bytes(self.disk))
            found = answer.json()
            self.told[answer.status_code, (found.get("error") or {}).get("code") or ""] += 1
            if answer.status_code == 200:
                self.ids.append(found["id"])

    async def _pieces(self) -> AsyncIterator[bytes]:
        yield HEAD
        for _ in range(FILE_BYTES >> 16):
            yield bytes(1 << 16)
            self.least_free = min(self.least_free, free_bytes(self.disk))
        yield END


async def answered(http: httpx2.AsyncClient, model: str) -> None:
    """Have a stream answered to its end."""
    body = {"model": model, "prompt": "Once", "max_tokens": 8, "stream": True}
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        text = (await answer.aread()).decode()
        assert answer.status_code == 200, text
    assert text.rstrip().endswith("data: [DONE]"), text


async def test_a_tenant_that_fills_the_disk_stops_nobody(url: str, disk: Path, queue: EmbeddedServer) -> None:
    async with httpx2.AsyncClient(base_url=url, timeout=60) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        stop, num_answers = asyncio.Event(), 0

        async def streams() -> None:
            nonlocal num_answers
            while not stop.is_set():
                await answered(http, model)
                num_answers += 1

        task = asyncio.create_task(streams())
        tenant = Tenant(http, disk)
        await asyncio.gather(*map(tenant.fill, range(NUM_ATTACKERS)))
        assert set(tenant.told) == {(200, ""), (507, "no_room")}, tenant.told
        assert tenant.ids
        # Written between two checks: parts of concurrent uploads, and the queue's own log.
        assert tenant.least_free >= KEEP_FREE - (2 << 20)
        assert (await http.get("/health")).json()["status"] == "ready"
        at = num_answers
        await wait_until(lambda: task.done() or num_answers > at + 1, "a stream has begun and ended beside a full disk")
        for file_id in tenant.ids:
            assert (await http.delete(f"/v1/files/{file_id}")).status_code == 200
        assert free_bytes(disk) > DISK_BYTES - (8 << 20)
        await answered(http, model)
        stop.set()
        await task
