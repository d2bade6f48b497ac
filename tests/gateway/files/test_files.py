"""Files with OpenAI's client, and malformed forms that no client sends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from helpers.scripted_fleet import RunningGateway, ScriptedFleet, running_gateway
from helpers.waiting import wait_until
from msgspec import structs
from openai import APIStatusError, AsyncOpenAI

from gateway.auth.callers import EVERYBODY
from gateway.bodies.json_slices import ROWS
from gateway.files.files import FileService
from gateway.files.storage import FolderStorage
from protocol.queue.bus import Bus, now_ms
from protocol.runtime.settings import Settings

LINE = b'{"custom_id": "a"}\n'


@pytest_asyncio.fixture
async def small(bus: Bus, fleet: ScriptedFleet, model_folder: Path, tmp_path: Path) -> Any:
    """A gateway with low limits on files."""
    limits = {"max_file_bytes": 100_000, "tenant_file_bytes": 150_000, "tenant_files": 5, "data": tmp_path}
    async with running_gateway(bus, model_folder, **limits) as gateway:
        yield gateway


@pytest_asyncio.fixture
async def openai(small: RunningGateway) -> Any:
    async with AsyncOpenAI(base_url=f"{small.url}/v1", api_key="any", max_retries=0) as client:
        yield client


async def refusal(openai: AsyncOpenAI, **asked: Any) -> APIStatusError:
    with pytest.raises(APIStatusError) as caught:
        await openai.files.create(**{"file": ("a.jsonl", LINE), "purpose": "batch"} | asked)
    return caught.value


async def test_a_file_comes_back_as_it_was_sent(openai: AsyncOpenAI) -> None:
    content = bytes(range(256)) * 300
    made = await openai.files.create(file=('dir/naïve "x".jsonl', content), purpose="batch")
    assert (made.bytes, made.purpose, made.status) == (len(content), "batch", "processed")
    assert made.expires_at is not None
    assert made.expires_at - made.created_at == 30 * 86_400
    assert (await openai.files.content(made.id)).content == content
    assert await openai.files.retrieve(made.id) == made
    assert (await openai.files.wait_for_processing(made.id)).id == made.id
    assert (await openai.files.delete(made.id)).deleted
    for ask in (openai.files.retrieve, openai.files.content, openai.files.delete):
        with pytest.raises(APIStatusError) as caught:
            await ask(made.id)
        assert (caught.value.status_code, caught.value.code) == (404, "file_not_found")


async def test_lists_page_in_both_orders(openai: AsyncOpenAI) -> None:
    made = [(await openai.files.create(file=(f"{i}", LINE), purpose="batch")).id for i in range(4)]
    assert [file.id async for file in openai.files.list(limit=3)] == made[::-1]
    assert [file.id async for file in openai.files.list(limit=3, order="asc")] == made
    assert [file.id async for file in openai.files.list(purpose="batch_output")] == []
    with pytest.raises(APIStatusError):
        await openai.files.list(after="file-none")


async def test_a_long_list_is_a_page_like_others(openai: AsyncOpenAI, bus: Bus) -> None:
    """The answer is written in slices."""
    made = await openai.files.create(file=("a", LINE), purpose="batch")
    record = await bus.files.get(made.id, EVERYBODY.owner)
    assert record is not None
    for number in range(2 * ROWS):
        await bus.files.keep(structs.replace(record, id=f"file-{number}"), max_bytes=0, max_files=0)
    page = await openai.files.list()
    assert {file.id for file in page.data} == {made.id, *(f"file-{number}" for number in range(2 * ROWS))}
    assert (page.has_more, page.data[0].model_copy(update={"id": made.id})) == (False, made)


async def test_what_an_upload_refuses(openai: AsyncOpenAI, tmp_path: Path) -> None:
    assert (await refusal(openai, purpose="vision")).param == "purpose"
    assert (await refusal(openai, file=("a", b"x" * 100_001))).status_code == 413
    short = await refusal(openai, expires_after={"anchor": "created_at", "seconds": 60})
    assert (short.status_code, short.param) == (400, "expires_after")
    assert (await refusal(openai, extra_body={"prupose": "batch"})).param == "prupose"
    kept = await openai.files.create(file=("a", b"x" * 70_000), purpose="batch")
    await openai.files.create(file=("a", b"x" * 70_000), purpose="batch")
    over = await refusal(openai, file=("a", b"x" * 70_000))
    assert over.status_code == 429
    assert "150000" in over.message
    await openai.files.delete(kept.id)
    for _ in range(4):
        await openai.files.create(file=("a", LINE), purpose="batch")
    assert (await refusal(openai)).status_code == 429
    assert len(found_below(tmp_path)) == 5


def found_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


BOUNDARY = "b0"


def form(*parts: bytes, end: bytes = b"--b0--\r\n") -> bytes:
    return b"".join(b"--b0\r\n" + part + b"\r\n" for part in parts) + end


FILE = b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\nhello'
PURPOSE = b'Content-Disposition: form-data; name="purpose"\r\n\r\nbatch'


async def test_odd_forms_get_an_answer_and_leave_nothing(
    subtests: pytest.Subtests, small: RunningGateway, tmp_path: Path
) -> None:
    for body, status in [
        (form(FILE, PURPOSE), 200),
        (form(PURPOSE, FILE), 200),
        (form(PURPOSE), 400),
        (form(FILE), 400),
        (form(FILE, FILE, PURPOSE), 400),
        (form(FILE, PURPOSE, PURPOSE), 400),
        (form(FILE, PURPOSE, end=b""), 400),
        (form(FILE.replace(b'"file"', b'"other"'), PURPOSE), 400),
        (form(FILE, PURPOSE + b"x" * 5000), 400),
        (form(FILE, *[PURPOSE.replace(b"purpose", b"p%d" % i) for i in range(40)]), 400),
        (form(b"X: " + b"y" * 5000 + b"\r\n" + FILE, PURPOSE), 400),
        (form(*[b"\r\n".join(b"H%d: x" % i for i in range(40)) + b"\r\n" + FILE], PURPOSE), 400),
        (form(FILE, PURPOSE.replace(b"batch", b"\xff")), 400),
        (b"junk", 400),
        (b"", 400),
    ]:
        with subtests.test(body=body, status=status):
            before = found_below(tmp_path)
            async with small.client() as http:
                headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
                answer = await http.post("/v1/files", content=body, headers=headers)
            assert answer.status_code == status, answer.text
            if status != 200:
                assert answer.json()["error"]["message"]
                assert found_below(tmp_path) == before


async def test_a_purpose_before_the_file_is_refused_before_the_file_is_sent(
    small: RunningGateway, tmp_path: Path
) -> None:
    host, port = small.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/files HTTP/1.1\r\nHost: {host}\r\nContent-Length: 50000\r\n"
    wrong = PURPOSE.replace(b"batch", b"vision")
    writer.write(
        f"{head}Content-Type: multipart/form-data; boundary=b0\r\n\r\n".encode() + form(wrong, FILE)[:-10] + b"x" * 999
    )
    assert b" 400 " in await reader.readline()
    writer.close()
    await wait_until(lambda: not found_below(tmp_path), "nothing is kept")


async def test_headers_with_many_parameters_are_not_taken_apart(small: RunningGateway) -> None:
    """Their parser takes a millisecond of the event loop for each two thousand."""
    many = b";" * 4000
    async with small.client() as http:
        for kind, file in ((b"", FILE.replace(b"\r\n", many + b"\r\n", 1)), (12 * many, FILE)):
            headers = {b"content-type": b"multipart/form-data; boundary=b0" + kind}
            answer = await http.post("/v1/files", content=form(PURPOSE, file), headers=headers)
            assert answer.status_code == 400
            assert "semicolons; the limit is 64" in answer.json()["error"]["message"]


async def test_a_body_that_is_no_form_is_refused(small: RunningGateway) -> None:
    async with small.client() as http:
        for headers in ({}, {"content-type": "application/json"}, {"content-type": "multipart/form-data"}):
            assert (await http.post("/v1/files", content=b"{}", headers=headers)).status_code == 400


async def test_a_client_that_leaves_in_the_middle_leaves_nothing(small: RunningGateway, tmp_path: Path) -> None:
    host, port = small.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/files HTTP/1.1\r\nHost: {host}\r\nContent-Length: 50000\r\n"
    writer.write(
        f"{head}Content-Type: multipart/form-data; boundary=b0\r\n\r\n".encode() + form(FILE)[:-10] + b"x" * 999
    )
    await wait_until(lambda: found_below(tmp_path), "the upload has begun")
    writer.close()
    await wait_until(lambda: not found_below(tmp_path), "what was begun is deleted")


async def test_expired_files_are_deleted_with_their_bytes(bus: Bus, tmp_path: Path) -> None:
    files = FileService(bus, FolderStorage(tmp_path), Settings(redis_url=bus.url, model="any"))

    async def chunks() -> AsyncIterator[bytes]:
        yield LINE

    short, long = [await files.make(f"file-{life_s}", "t", "a", chunks(), life_s) for life_s in (0.05, 600)]
    assert short is not None
    assert long is not None
    assert await bus.files.get(long.id, "other") is None

    async def is_gone() -> bool:
        await files.delete_expired()
        return await bus.files.get(short.id, "t") is None

    await wait_until(is_gone, "the file has expired")
    await files.delete_expired()
    assert [path.name for path in (tmp_path / "files").iterdir()] == [long.id]
    assert await bus.files.ids("t", 0, 10, oldest_first=True) == [long.id]
    assert await bus.files.expired(now_ms(), 10) == []


class Stuck(FolderStorage):
    """A storage that fails to delete some names, and records the order of other deletions."""

    def __init__(self, root: Path, stuck: set[str]) -> None:
        super().__init__(root)
        self.stuck = stuck
        self.deleted: list[str] = []

    async def delete(self, name: str) -> None:
        if name in self.stuck:
            raise PermissionError(13, "Permission denied")
        self.deleted.append(name)
        await super().delete(name)


async def test_expired_files_are_deleted_by_turns_of_tenants(bus: Bus, tmp_path: Path) -> None:
    """A tenant with thousands of files delays no others; files that can't be deleted are retried later."""
    storage = Stuck(tmp_path, {f"files/file-stuck{n}" for n in range(20)})
    files = FileService(bus, storage, Settings(redis_url=bus.url, model="any"))
    many = {f"rich:file-{n:05}": n + 1 for n in range(3000)}
    stuck = {f"stuck:file-stuck{n}": 1 for n in range(20)}
    await bus._redis.zadd(bus.keys.file_expiry, {**many, **stuck, "late:file-late": 1_000_000})
    await files.delete_expired()
    assert len(storage.deleted) == 3001
    assert storage.deleted.index("files/file-late") < 150, "a share of each round, and three rounds before it"
    left = await bus._redis.zrange(bus.keys.file_expiry, 0, -1, withscores=True)
    assert len(left) == 20
    assert all(at_ms > now_ms() - 60_000 for _, at_ms in left), "they are put off"
    await bus._redis.delete(bus.keys.file_expiry)
