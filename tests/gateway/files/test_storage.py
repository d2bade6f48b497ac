"""Both kinds of storage contain exactly the files that were written completely."""

from __future__ import annotations

import asyncio
import os
import select
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import AsyncGeneratorType

import pytest
from helpers.s3_server import BUCKET, S3Server, run_s3
from helpers.waiting import wait_until

from gateway.files.place import open_storage
from gateway.files.s3_storage import S3Storage
from gateway.files.storage import ABANDONED_S, PARTIAL, FolderStorage, Storage
from protocol.runtime.free_space import Reserve
from protocol.wire.errors import BadRequest, NoRoom, NotFound, Unavailable


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with run_s3() as server:
        yield server


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return FolderStorage(tmp_path / "files")
    return S3Storage(request.getfixturevalue("s3").client(), BUCKET, f"{tmp_path.name}/")


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def content(storage: Storage, name: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join([chunk async for chunk in storage.read(name, start, end)])


async def test_what_was_written_is_read_whole_or_in_part(storage: Storage) -> None:
    text = os.urandom(700_000)
    assert await storage.write("a/b", chunks(text[:1], b"", text[1:])) == len(text)
    assert await content(storage, "a/b") == text
    assert await content(storage, "a/b", 100, 600_000) == text[100:600_000]
    assert await content(storage, "a/b", 5, 5) == b""
    assert await content(storage, "a/b", len(text)) == b""
    await storage.write("a/b", chunks(b"new"))
    assert await content(storage, "a/b") == b"new"
    await storage.write("a/empty", chunks())
    assert await content(storage, "a/empty") == b""


async def test_names_and_deletion(storage: Storage) -> None:
    for name in ("x/2", "x/1", "xy"):
        await storage.write(name, chunks(b"1"))
    assert await storage.names("x") == ["x/1", "x/2"]
    await storage.delete("x")
    assert await storage.names("x") == []
    assert await content(storage, "xy") == b"1"
    await storage.delete("xy")
    await storage.delete("xy")
    with pytest.raises(NotFound):
        await content(storage, "xy")


async def test_what_is_written_is_closed_if_writing_fails(tmp_path: Path) -> None:
    """What is not read to its end would keep its file open until it is collected."""
    source = FolderStorage(tmp_path / "source")
    await source.write("a", chunks(os.urandom(1_000_000)))
    opened = source.read("a")
    with pytest.raises(NoRoom):
        await FolderStorage(tmp_path / "files", Reserve(1 << 60)).write("a", opened)
    assert isinstance(opened, AsyncGeneratorType)
    assert opened.ag_frame is None, "it is still suspended"


async def test_a_missing_folder_is_no_missing_file(tmp_path: Path) -> None:
    """A batch whose input does not exist has failed; one whose storage is away for a moment waits."""
    storage = FolderStorage(tmp_path / "files")
    await storage.write("a", chunks(b"1"))
    (tmp_path / "files").rename(tmp_path / "away")
    for end in (None, 1):
        with pytest.raises(Unavailable, match="its folder is missing"):
            await content(storage, "a", 0, end)
    (tmp_path / "away").rename(tmp_path / "files")
    assert await content(storage, "a") == b"1"
    with pytest.raises(NotFound):
        await content(storage, "b")


async def test_what_breaks_off_leaves_nothing(storage: Storage) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"1"
        raise BadRequest("enough")

    with pytest.raises(BadRequest, match="enough"):
        await storage.write("a", broken())
    assert await storage.names("") == []


async def test_a_folder_is_its_users_and_tidies_what_was_left(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "files")
    await storage.write("a/b", chunks(b"1"))
    modes = [stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (tmp_path / "files").rglob("*")]
    assert set(modes) == {0}
    old, new = (tmp_path / "files" / f"{name}{PARTIAL}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"1")
    then = old.stat().st_mtime - ABANDONED_S - 10
    os.utime(old, (then, then))
    await storage.tidy()
    assert (old.exists(), new.exists()) == (False, True)
    assert await storage.names("") == ["a/b"]


async def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "files").write_bytes(b"not a folder")
    with pytest.raises(Unavailable, match="cannot be written"):
        await FolderStorage(tmp_path / "files").write("a", chunks(b"1"))


async def test_a_folder_that_cannot_be_deleted_is_told(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")  # which is not followed
    with pytest.raises(Unavailable, match="cannot be changed"):
        await FolderStorage(tmp_path).delete("link")
    await FolderStorage(tmp_path).delete("never/there")


async def test_a_bucket_that_is_not_there_is_told(s3: S3Server) -> None:
    storage = S3Storage(s3.client(), "nobodys", "")
    with pytest.raises(Unavailable, match="failed"):
        await storage.write("a", chunks(b"1"))
    with pytest.raises(Unavailable):
        await content(storage, "a")


def test_the_setting_names_a_folder_or_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    assert isinstance(open_storage("", tmp_path), FolderStorage)
    assert isinstance(open_storage(str(tmp_path), tmp_path), FolderStorage)
    assert isinstance(open_storage("s3://bucket/some/prefix", tmp_path), S3Storage)
    with pytest.raises(BadRequest, match="has no bucket"):
        open_storage("s3:///prefix", tmp_path)


async def test_a_reader_that_is_cancelled_leaves_no_open_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"  # opening a pipe blocks until the other end is opened
    os.mkfifo(pipe)
    reading = asyncio.create_task(content(FolderStorage(tmp_path), "pipe"))

    def writer() -> int | None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # not open for reading yet
            return None

    await asyncio.sleep(0)  # the file is opened in a thread
    reading.cancel()
    await asyncio.wait([reading])
    side = await wait_until(writer, "the thread opens the pipe")
    try:
        await wait_until(lambda: _has_no_reader(side), "the pipe is closed again")
    finally:
        os.close(side)


def _has_no_reader(writer: int) -> bool:
    poll = select.poll()
    poll.register(writer, 0)
    return bool(poll.poll(0))
