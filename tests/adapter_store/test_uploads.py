"""Uploaded adapters: what a zip may contain, what it can cost, and how long it is kept."""

from __future__ import annotations

import asyncio
import io
import os
import time
import zipfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from helpers.adapter_files import zipped

from adapter_store.uploads import FOLDER, KEPT_S, Uploads, unpack
from protocol.runtime.free_space import Reserve, size_of
from protocol.wire.errors import AdapterRefused, BadRequest, Conflict, LorafleetError, NoRoom, Overloaded, TooLarge

NUM_FUZZED = int(os.environ.get("LORAFLEET_FUZZED_ZIPS", "3000"))

GOOD = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights" * 1000}


def unpacked(tmp_path: Path, raw: bytes, max_bytes: int = 1 << 20) -> dict[str, bytes]:
    archive, folder = tmp_path / "a.zip", tmp_path / "out"
    archive.write_bytes(raw)
    unpack(archive, folder, max_bytes)
    assert all(path.parent == folder for path in folder.rglob("*"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def chunks(raw: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for begin in range(0, len(raw), size):
        yield raw[begin : begin + size]


@pytest.mark.parametrize("prefix", ["", "adapter/", "./a/b/", "..\\..\\up\\"])
@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_adapter_is_found_wherever_it_lies(tmp_path: Path, prefix: str, how: int) -> None:
    more = {
        f"{prefix}README.md": b"x",
        f"{prefix}checkpoint-5/adapter_model.safetensors": b"other",
        "__MACOSX/._x": b"",
    }
    files = {prefix + name: data for name, data in GOOD.items()}
    assert unpacked(tmp_path, zipped(files | more, how)) == GOOD


@pytest.mark.parametrize(
    "name", ["../adapter_model.safetensors", "/adapter_model.safetensors", "a/../../adapter_model.safetensors"]
)
def test_no_name_of_a_zip_becomes_a_path(tmp_path: Path, name: str) -> None:
    found = unpacked(tmp_path, zipped({name: b"w", "../../evil.py": b"evil", "/etc/passwd": b"evil"}))
    assert found == {"adapter_model.safetensors": b"w"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "out"]


def test_links_in_a_zip_are_files(tmp_path: Path) -> None:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        link = zipfile.ZipInfo("adapter_model.safetensors")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    assert unpacked(tmp_path, raw.getvalue()) == {"adapter_model.safetensors": b"/etc/passwd"}
    assert not (tmp_path / "out" / "adapter_model.safetensors").is_symlink()


def test_a_bomb_is_stopped_by_what_it_writes(tmp_path: Path) -> None:
    bomb = zipped({"adapter_model.safetensors": bytes(50 << 20)})
    assert len(bomb) < 100_000
    with pytest.raises(TooLarge, match="more than 1048576 bytes"):
        unpacked(tmp_path, bomb)
    # A zip whose directory and local header both state a false size.
    at = bomb.rindex(b"PK\1\2")
    lying = bytearray(bomb)
    for place in (22, at + 24):
        lying[place : place + 4] = (1000).to_bytes(4, "little")
    with pytest.raises(LorafleetError):
        unpacked(tmp_path, bytes(lying))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 1 << 20


def test_a_text_is_bounded_by_itself(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    archive.write_bytes(zipped(GOOD | {"adapter_config.json": bytes(1001)}))
    with pytest.raises(TooLarge, match=r"adapter_config\.json"):
        unpack(archive, tmp_path / "out", 1 << 20, max_text_bytes=1000)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "cannot be read"),
        (b"PK\3\4 nothing", "cannot be read"),
        (zipped({"README.md": b"x"}), "has no adapter"),
        (zipped({"a/adapter_model.safetensors": b"1", "b/adapter_model.safetensors": b"2"}), "2 adapters side by side"),
        (zipped({"a.gguf": b"1", "b.gguf": b"2"}), "GGUF"),
        (zipped(GOOD, zipfile.ZIP_LZMA), "compression other than deflate"),
        (zipped(GOOD)[:-30], "cannot be read"),
        (zipped({f"f{number}": b"" for number in range(1001)} | GOOD), "1003 entries"),
        (zipped({f"{number:0>1100}": b"" for number in range(1000)}), "directory is too large"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_zip_of_an_adapter_is_told(tmp_path: Path, raw: bytes, why: str) -> None:
    with pytest.raises(LorafleetError, match=why):
        unpacked(tmp_path, raw)


def test_damage_in_a_file_is_told(tmp_path: Path) -> None:
    raw = bytearray(zipped(GOOD, zipfile.ZIP_STORED))
    raw[raw.index(b"weights") + 3] ^= 1
    with pytest.raises(BadRequest, match="CRC"):
        unpacked(tmp_path, bytes(raw))


def test_any_damage_is_told_as_the_zips(tmp_path: Path) -> None:
    """Bytes are changed, cut, duplicated or moved: the result is an adapter, or an error that names the fault."""
    random, refused = Random(0), Counter[str]()
    seeds = [zipped(GOOD), zipped(GOOD, zipfile.ZIP_STORED), zipped(GOOD | {"../x\0y": b"", "tokenizer.json": b"{}"})]
    numbers = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\1\0\0\0", b"PK\5\6", b"PK\6\6", b"PK\6\7"]
    for number in range(NUM_FUZZED):
        raw = bytearray(random.choice(seeds))
        for _ in range(random.randint(1, 4)):
            at = random.randrange(len(raw) // 2, len(raw)) if random.random() < 0.8 else random.randrange(len(raw))
            change = random.randrange(4)
            if change == 0:
                raw[at : at + 4] = random.choice(numbers)
            elif change == 1:
                raw[at] = random.randrange(256)
            elif change == 2:
                del raw[at : at + random.randint(1, 40)]
            else:
                raw[at:at] = raw[max(0, at - random.randint(1, 100)) : at]
        (tmp_path / "a.zip").write_bytes(raw)
        try:
            unpack(tmp_path / "a.zip", tmp_path / str(number), 1 << 20)
        except (BadRequest, TooLarge, AdapterRefused) as error:
            refused[error.message[:30]] += 1
    assert len(refused) > 8
    assert all(refused)


def altered(at: bytes, offset: int, value: bytes) -> bytes:
    """Return a good zip with bytes replaced at an offset from the last record with the signature `at`."""
    raw = bytearray(zipped(GOOD))
    begin = raw.rindex(at) + offset
    raw[begin : begin + len(value)] = value
    return bytes(raw)


MADE = {
    "a directory before the file": altered(b"PK\5\6", 12, b"\xff\xff\xff\x7f"),
    "a directory beyond the file": altered(b"PK\5\6", 16, b"\xff\xff\xff\x7f"),
    "an entry beyond the file": altered(b"PK\1\2", 42, b"\xff\xff\xff\x7f"),
    "an entry before the file": altered(b"PK\5\6", 16, b"\0\0\0\0"),
    "an entry without a name": altered(b"PK\1\2", 46, b"\0"),
    "encrypted": altered(b"PK\1\2", 8, b"\1\0"),
    "an unknown compression": altered(b"PK\1\2", 10, b"\x63\0"),
    "a wrong CRC": altered(b"PK\1\2", 16, b"\1\2\3\4"),
    "4 GB of one byte": altered(b"PK\1\2", 24, b"\xfe\xff\xff\xff"),
    "zip64 without its fields": altered(b"PK\1\2", 24, b"\xff\xff\xff\xff"),
    "a version of the future": altered(b"PK\1\2", 6, b"\xff\xff"),
    "zip64's end at byte 2^63": b"PK\6\6"
    + bytes(52)
    + b"PK\6\7"
    + bytes(4)
    + b"\xff" * 8
    + bytes(4)
    + zipped(GOOD)[-22:],
}


@pytest.mark.parametrize("name", MADE)
async def test_zips_made_to_confuse_are_4xx(tmp_path: Path, name: str) -> None:
    kept = Uploads(tmp_path, 1 << 20, 1 << 20)
    with pytest.raises(LorafleetError) as refused:
        await kept.take(chunks(MADE[name]), len(MADE[name]))
    assert refused.value.status in (400, 413)
    assert "zip" in refused.value.message
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_entries_that_share_bytes_write_no_more_than_the_limit(tmp_path: Path) -> None:
    """Hundreds of entries over one block of zeros are the most costly zip possible."""
    kernel = zipped({"adapter_model.safetensors": bytes(1 << 20)})
    begin, end = kernel.rindex(b"PK\1\2"), kernel.rindex(b"PK\5\6")
    entry = kernel[begin:end]
    entries = [entry.replace(b"adapter_model", b"%013d" % number) for number in range(900)] + [entry]
    tail = bytearray(kernel[end:])
    tail[8:12] = len(entries).to_bytes(2, "little") * 2
    tail[12:16] = sum(map(len, entries)).to_bytes(4, "little")
    archive = tmp_path / "a.zip"
    archive.write_bytes(kernel[:begin] + b"".join(entries) + bytes(tail))
    with suppress(BadRequest):  # some versions of Python refuse it
        unpack(archive, tmp_path / "out", 1 << 20)
    assert size_of(tmp_path / "out") <= 1 << 20


async def test_a_disk_without_room_takes_no_upload(tmp_path: Path) -> None:
    raw = zipped(GOOD)
    for free, is_taken in ((1000 + 2 * len(raw) - 1, False), (1000 + 7000, True), (1000 + 6999, False)):
        # The zip has 300 bytes, its adapter 7000: the limit is detected while writing.
        kept = Uploads(tmp_path, 1 << 20, 1 << 20, Reserve(1000, lambda place, free=free: free))
        if is_taken:
            await kept.take(chunks(raw), len(raw))
            continue
        with pytest.raises(NoRoom, match="1000 are kept free"):
            await kept.take(chunks(raw), len(raw))
    assert len(list((tmp_path / FOLDER).iterdir())) == 1


async def test_uploads_beside_each_other_share_the_limit(tmp_path: Path) -> None:
    raw, most = zipped(GOOD), 21_006 + 1000
    kept = Uploads(tmp_path, most, 1 << 20)
    inner: list[LorafleetError] = []

    async def outer() -> AsyncIterator[bytes]:
        yield raw
        try:
            await kept.take(chunks(raw), (most - 2 * len(raw)) // 2 + 1)
        except LorafleetError as error:
            inner.append(error)

    await kept.take(outer(), len(raw))
    assert "and this one needs twice its" in inner[0].message
    for _ in range(2):
        await kept.take(chunks(raw), len(raw))
    for process in (kept, Uploads(tmp_path, most, 1 << 20)):
        with pytest.raises(TooLarge, match="uploads use 21006 bytes"):
            await process.take(chunks(raw), 501)


async def test_what_two_unpack_to_at_once_shares_the_limit(tmp_path: Path) -> None:
    """Two zips of nine kilobytes unpack to nine megabytes each, with space for one."""
    uploads = Uploads(tmp_path, 10_000_000, 100_000_000)
    raw = zipped({**GOOD, "adapter_model.safetensors": bytes(9_000_000)})
    both_are_there = asyncio.Barrier(2)

    async def come() -> AsyncIterator[bytes]:
        yield raw[:10]
        await both_are_there.wait()
        yield raw[10:]

    async with asyncio.timeout(30):
        taken = await asyncio.gather(*(uploads.take(come(), len(raw)) for _ in range(2)), return_exceptions=True)
    assert {type(one) for one in taken} == {str, TooLarge}
    assert size_of(tmp_path) <= 10_000_000


async def test_an_upload_becomes_a_folder_that_is_kept_by_its_name(tmp_path: Path) -> None:
    kept = Uploads(tmp_path, 1 << 20, 1 << 20)
    raw = zipped(GOOD)
    source = await kept.take(chunks(raw), len(raw))
    place = tmp_path / source.removeprefix("local:")
    assert sorted(path.name for path in place.iterdir()) == sorted(GOOD)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [place.name]
    old = time.time() - KEPT_S - 1
    os.utime(place, (old, old))
    kept.sweep({source})
    assert time.time() - place.stat().st_mtime < 60  # the sweep has renewed it
    kept.sweep(set())
    assert place.exists()
    os.utime(place, (old, old))
    kept.sweep(set())
    assert not place.exists()


async def test_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    kept = Uploads(tmp_path, 1 << 20, 1 << 20)
    for raw in (b"no zip", zipped({"adapter_model.safetensors": bytes(2 << 20)})):
        with pytest.raises(LorafleetError):
            await kept.take(chunks(raw), len(raw))
    assert list((tmp_path / FOLDER).iterdir()) == []
    raw = zipped(GOOD)
    source = await kept.take(chunks(raw), len(raw))
    assert not kept.drop("../kept")
    assert kept.drop(source.rpartition("/")[2])
    assert not kept.drop(source.rpartition("/")[2])


async def test_uploads_have_a_quota_and_come_two_at_once(tmp_path: Path) -> None:
    kept = Uploads(tmp_path, 100_000, 1 << 20)
    with pytest.raises(TooLarge, match="upload_bytes is 100000"):
        await kept.take(chunks(b""), 50_001)
    go, raw = asyncio.Event(), zipped(GOOD)

    async def slow() -> AsyncIterator[bytes]:
        yield raw[:10]
        await go.wait()
        yield raw[10:]

    tasks = [asyncio.create_task(kept.take(slow(), len(raw))) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await kept.take(chunks(raw), len(raw))
    go.set()
    assert len(set(await asyncio.gather(*tasks))) == 2


async def test_without_a_place_or_at_0_none_are_taken(tmp_path: Path) -> None:
    for kept in (Uploads(None, 1 << 20, 1 << 20), Uploads(tmp_path, 0, 1 << 20)):
        with pytest.raises(Conflict) as refused:
            await kept.take(chunks(b"x"), 1)
        assert refused.value.code == "uploads_off"
