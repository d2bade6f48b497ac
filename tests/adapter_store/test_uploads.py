"""Uploaded adapters: what a zip may hold, what it can cost, and how long it is kept."""

from __future__ import annotations

import asyncio
import io
import os
import time
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapter_store.uploads import FOLDER, KEPT_S, Uploads, unpack
from protocol.wire.errors import BadRequest, Conflict, LorafleetError, Overloaded, TooLarge

GOOD = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights" * 1000}


def zipped(files: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", how) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return raw.getvalue()


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
    # One that lies about its size in the directory and the entry's head.
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
        (zipped(GOOD, zipfile.ZIP_LZMA), "another way than deflate"),
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
    assert time.time() - place.stat().st_mtime < 60  # it is as new
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
