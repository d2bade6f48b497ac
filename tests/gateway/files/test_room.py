"""Files with a full disk, a lost reply, or a queue that refuses writes: nothing is left half done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from helpers.s3_server import BUCKET, run_s3
from helpers.scripted_fleet import ScriptedFleet, gateway_client
from helpers.waiting import wait_until
from redis.exceptions import ConnectionError as RedisConnectionError

from chaos.shortage import disk_again, no_disk
from gateway.auth.callers import EVERYBODY, Caller
from gateway.files.files import FORM_BYTES, FileService, UploadLimits
from gateway.files.s3_storage import S3Storage
from gateway.files.storage import FolderStorage, Storage
from gateway.files.upload import UploadedForm
from lorafleet.launcher.embedded import EmbeddedServer
from protocol.queue.books.api_keys import Tenant
from protocol.queue.bus import CONNECTION_ERRORS, Bus, DiskFull, now_ms
from protocol.queue.kept.files import Files, Outcome
from protocol.runtime.free_space import Reserve
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError, NoRoom, Overloaded, Unavailable
from protocol.wire.keys import Keys

FORM_TYPE = "multipart/form-data; boundary=b0"
PURPOSE = b'--b0\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
HEAD = PURPOSE + b'--b0\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
END = b"\r\n--b0--\r\n"
OWNER = EVERYBODY.owner


class Disk:
    """The free space of a disk, as a callable."""

    def __init__(self, free: int) -> None:
        self.free = free

    def __call__(self, place: Path) -> int:
        return self.free


def service(bus: Bus, storage: Storage, **limits: int) -> FileService:
    return FileService(bus, storage, Settings(redis_url=bus.url, model="any", **limits))  # type: ignore[arg-type]


async def upload(files: FileService, *parts: bytes, length: int = 0, caller: Caller = EVERYBODY) -> m.File:
    async def body() -> AsyncIterator[bytes]:
        yield HEAD
        for part in parts:
            yield part
        yield END

    return await files.upload(UploadedForm(FORM_TYPE, 1 << 30), body(), caller, length)


def below(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


async def held(bus: Bus) -> dict[bytes, bytes]:
    """Return the accounted sizes of the tenant's files."""
    return await bus._redis.hgetall(bus.keys.file_sizes(OWNER))  # type: ignore[misc]


async def test_a_full_disk_refuses_uploads_before_they_are_read(bus: Bus, tmp_path: Path) -> None:
    files = service(bus, FolderStorage(tmp_path, Reserve(1000, Disk(1500))))
    with pytest.raises(NoRoom, match="1500 free, and 1000 are kept free"):
        await upload(files, b"never read", length=501)
    assert below(tmp_path) == []
    assert await held(bus) == {}


async def test_a_disk_that_fills_meanwhile_ends_an_upload(bus: Bus, tmp_path: Path) -> None:
    disk = Disk(10_000)

    class Filling(FolderStorage):
        def _append(self, file: Any, part: Path, chunk: bytes | bytearray) -> None:
            super()._append(file, part, chunk)
            disk.free -= 5 * len(chunk)  # others write too

    files = service(bus, Filling(tmp_path, Reserve(1000, disk)))
    with pytest.raises(NoRoom):
        await upload(files, *[b"x" * 1000] * 3, length=3300)
    assert below(tmp_path) == []
    assert await held(bus) == {b"sum": b"0"}


def slow_ends(bus: Bus, folder: Path, num: int, num_of_tenant: int) -> FileService:
    """Return a file service that treats each upload as too slow while others wait."""
    settings = Settings(redis_url=bus.url, model="any")
    limits = UploadLimits(num=num, num_of_tenant=num_of_tenant, slow_bytes_per_s=1 << 50, slow_after_s=0.0)
    return FileService(bus, FolderStorage(folder, Reserve(0, Disk(1 << 30))), settings, limits)


async def begun(files: FileService, caller: Caller, may_go_on: asyncio.Event) -> asyncio.Task[m.File]:
    """Return an upload that has its slot and continues after `may_go_on`."""
    has_begun = asyncio.Event()

    async def drip() -> AsyncIterator[bytes]:
        yield HEAD + b"a"
        has_begun.set()
        await may_go_on.wait()
        yield b"b" * 1000
        yield END

    task = asyncio.create_task(files.upload(UploadedForm(FORM_TYPE, 1 << 30), drip(), caller, 0))
    await has_begun.wait()
    return task


async def waiting(files: FileService, caller: Caller) -> asyncio.Task[m.File]:
    """Return an upload that waits for a slot."""
    num = sum(map(len, files._uploads._waiting.values()))
    task = asyncio.create_task(upload(files, b"c", caller=caller))

    async def waits() -> bool:
        return sum(map(len, files._uploads._waiting.values())) > num

    await wait_until(waits, "another upload waits")
    return task


async def test_a_slow_upload_makes_place_for_who_waits(bus: Bus, tmp_path: Path) -> None:
    files, may_go_on = slow_ends(bus, tmp_path, num=3, num_of_tenant=3), asyncio.Event()
    assert (await upload(files, b"a", b"b")).num_bytes == 2  # no other upload waits
    slow = [await begun(files, EVERYBODY, may_go_on) for _ in range(3)]
    other = await waiting(files, Caller(Tenant("other")))
    may_go_on.set()
    ends = await asyncio.gather(*slow, return_exceptions=True)
    [ended] = [end for end in ends if isinstance(end, BaseException)]  # one slot is enough
    assert isinstance(ended, Overloaded)
    assert "other uploads are waiting" in str(ended)
    assert (await other).num_bytes == 1
    assert len(below(tmp_path)) == 4


async def test_who_waits_at_a_limit_of_its_own_ends_nobodys_upload(bus: Bus, tmp_path: Path) -> None:
    files, may_go_on = slow_ends(bus, tmp_path, num=3, num_of_tenant=1), asyncio.Event()
    slow = [await begun(files, Caller(Tenant(name)), may_go_on) for name in ("a", "b")]
    more = await waiting(files, Caller(Tenant("a")))
    may_go_on.set()
    assert [file.num_bytes for file in await asyncio.gather(*slow)] == [1001, 1001]
    assert (await more).num_bytes == 1


async def test_files_on_their_way_to_s3_leave_the_reserve(tmp_path: Path) -> None:
    with run_s3() as server:
        storage = S3Storage(server.client(), BUCKET, "room/", Reserve(1000, Disk(1500)))

        async def chunks() -> AsyncIterator[bytes]:
            yield b"x" * 501

        with pytest.raises(NoRoom):
            await storage.check_room(501)
        with pytest.raises(NoRoom):
            await storage.write("a", chunks())
        assert await storage.names("") == []


async def test_uploads_at_once_pass_no_limit_of_their_tenant(bus: Bus, tmp_path: Path) -> None:
    """Space is reserved before the first byte is written, so concurrent uploads count."""
    files = service(bus, FolderStorage(tmp_path), tenant_file_bytes=1_000_000, tenant_files=3)
    inner: list[BaseException] = []

    async def outer() -> AsyncIterator[bytes]:
        yield HEAD
        yield b"x" * 700_000
        try:
            await upload(files, b"y" * 400_000, length=400_000 + FORM_BYTES)
        except LorafleetError as error:
            inner.append(error)
        yield END

    kept = await files.upload(UploadedForm(FORM_TYPE, 1 << 30), outer(), EVERYBODY, 0)
    assert kept.num_bytes == 700_000
    assert [type(error) for error in inner] == [Overloaded]
    assert "the limit is 1000000" in str(inner[0])
    assert await held(bus) == {b"sum": b"700000", kept.id.encode(): b"700000"}
    # Uploads fit up to the last byte and not beyond, with or without a stated length.
    with pytest.raises(Overloaded, match="your files have 700000 bytes"):
        await upload(files, b"z" * 200_000, b"z" * 100_001)
    await upload(files, b"z" * 200_000, b"z" * 100_000)
    await upload(files, b"")
    with pytest.raises(Overloaded, match="you have 3 files"):
        await upload(files, b"")
    assert len(below(tmp_path)) == 3


class LostReplies(Files):
    """Records of files whose replies are lost, after or before the write."""

    is_written = True

    async def keep(self, file: m.File, *, max_bytes: int, max_files: int) -> Outcome:
        if self.is_written:
            await super().keep(file, max_bytes=max_bytes, max_files=max_files)
        raise RedisConnectionError("the reply is lost")


async def test_a_lost_reply_leaves_no_record_without_bytes(bus: Bus, tmp_path: Path, subtests: pytest.Subtests) -> None:
    bus.files = lossy = LostReplies(bus._redis, bus.keys, bus._scripts)
    files = service(bus, FolderStorage(tmp_path))
    for num_left, is_written in enumerate((True, False), start=1):
        with subtests.test(is_written=is_written):
            lossy.is_written = is_written
            with pytest.raises(RedisConnectionError):
                await upload(files, b"hello")
            found = await bus.files.get_many([name.decode() for name in await held(bus) if name != b"sum"])
            assert len(found) == 1
            for file in found:
                assert b"".join([chunk async for chunk in files.read(file)]) == b"hello"
            assert len(below(tmp_path)) == num_left  # the record's bytes; otherwise they are swept by id, as below


async def test_what_a_dead_gateway_left_is_swept_by_its_id(bus: Bus, tmp_path: Path) -> None:
    files = service(bus, FolderStorage(tmp_path))
    left = m.File(
        id="file-left", tenant=OWNER, filename="", purpose="", num_bytes=5, created_ms=now_ms(),
        expires_ms=now_ms() + 3_600_000,
    )  # fmt: skip

    async def chunks() -> AsyncIterator[bytes]:
        yield b"hello"

    assert (await bus.files.hold(left, max_bytes=0, max_files=0))[0] == "ok"
    await FolderStorage(tmp_path).write("files/file-left", chunks())  # and then the gateway died
    assert await bus.files.get("file-left", OWNER) is None
    assert await bus.files.ids(OWNER, 0, 10, oldest_first=True) == []
    await files.delete_expired()
    assert below(tmp_path) == ["file-left"]
    await bus.files.hold(_expired(left), max_bytes=0, max_files=0)
    await files.delete_expired()
    assert below(tmp_path) == []
    assert await held(bus) == {b"sum": b"0"}


def _expired(file: m.File) -> m.File:
    return m.File(file.id, file.tenant, "", "", file.num_bytes, file.created_ms, now_ms() - 1)


# ---------------------------------------------------------------- deleting


@pytest_asyncio.fixture
async def durable_bus(durable: EmbeddedServer) -> AsyncIterator[Bus]:
    bus = Bus(durable.url, Keys())
    yield bus
    await bus.close()


def suppressing(look: Callable[[], Awaitable[bool]]) -> Callable[[], Awaitable[bool]]:
    """Return a condition that is false while the queue can't be reached or refuses writes."""

    async def found() -> bool:
        try:
            return await look()
        except CONNECTION_ERRORS:
            return False

    return found


async def refuse_writes(server: EmbeddedServer, bus: Bus) -> None:
    no_disk(server.process, server.folder)

    async def refused() -> bool:
        try:
            await bus._redis.set(bus.keys.tag, "x", px=60_000)
        except DiskFull:
            return True
        return False

    await wait_until(refused, "the queue refuses writes")


async def test_deleting_frees_bytes_while_the_queue_cannot_write(
    durable: EmbeddedServer, durable_bus: Bus, tmp_path: Path
) -> None:
    bus, files = durable_bus, service(durable_bus, FolderStorage(tmp_path / "files"))
    file = await upload(files, b"x" * 1000)
    await refuse_writes(durable, bus)
    for _ in range(2):  # as clients retry
        with pytest.raises(Unavailable, match="content is deleted") as told:
            await files.delete(file.id, EVERYBODY)
        assert told.value.code == "queue_unavailable"
        assert below(tmp_path / "files") == []
    disk_again(durable.process)

    async def is_gone() -> bool:
        try:
            await files.delete_expired()
        except CONNECTION_ERRORS:  # it has not noticed the free space yet
            return False
        return await bus.files.get(file.id, OWNER) is None

    await wait_until(is_gone, "the record is forgotten without being asked again")
    assert await held(bus) == {b"sum": b"0"}


async def test_delete_over_http_frees_bytes_of_a_full_disk(
    durable: EmbeddedServer, durable_bus: Bus, tokenizer: Any, model_folder: Path, tmp_path: Path
) -> None:
    """No step on the way to the bytes writes to the queue: keys, admission, audit and limits included."""
    fleet = ScriptedFleet(durable_bus, tokenizer)
    await fleet.register()
    async with gateway_client(durable_bus, model_folder, data=tmp_path) as http:
        made = await http.post("/v1/files", content=HEAD + b"hello" + END, headers={"content-type": FORM_TYPE})
        assert made.status_code == 200, made.text
        place = tmp_path / "files" / "files" / made.json()["id"]
        assert place.read_bytes() == b"hello"
        await refuse_writes(durable, durable_bus)
        answer = await http.delete(f"/v1/files/{made.json()['id']}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_unavailable")
        assert not place.exists()

        async def is_named() -> bool:
            health = await http.get("/health")
            return (health.status_code, health.json()["status"]) == (503, "queue_disk_full")

        await wait_until(is_named, "/health names what is wrong")
        assert not (await durable_bus.server.facts()).append_ok  # which the doctor reports
        disk_again(durable.process)

        async def is_well() -> bool:
            await fleet.register()  # like the heartbeats of a worker
            return (await http.get("/health")).json()["status"] == "ready"

        await wait_until(suppressing(is_well), "/health is well again")
