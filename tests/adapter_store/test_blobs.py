"""Blobs are complete and verified, or absent: damage, crashes, quotas."""

from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.adapter_files import write_adapter

from adapter_store.blobs import STALE_STAGING_S, AdapterFolder, Blobs
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from protocol.runtime.free_space import Reserve
from protocol.wire.errors import AdapterRefused, NoRoom, Unavailable


def put(blobs: Blobs, seed: int, *, sync: bool = True, version: str = "") -> str:
    version = version or f"version-{seed}"
    folder = write_adapter(blobs.staging(version), seed)
    return blobs.put(version, AdapterFolder.open(folder), sync=sync)


def test_a_blob_survives_restarts(tmp_path: Path) -> None:
    digest = put(Blobs(tmp_path), 1)
    again = Blobs(tmp_path)
    assert digest in again
    assert again.digest_of("version-1") == digest
    assert again.digest_of("version-2") is None
    folder = again.verified(digest)
    assert folder is not None
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert again.num_bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_equal_content_is_one_blob(tmp_path: Path) -> None:
    """Also if configs differ only in fields without effect: the stored config is canonical."""
    blobs = Blobs(tmp_path)
    first = put(blobs, 1)
    folder = write_adapter(blobs.staging("other"), 1, lora_dropout=0.5, base_model_name_or_path="/secret/path")
    assert blobs.put("other", AdapterFolder.open(folder), sync=True) == first
    assert len(blobs) == 1
    assert not list((tmp_path / "staging").iterdir())
    kept = blobs.verified(first)
    assert kept is not None
    assert set(json.loads((kept / CONFIG_FILE).read_text())) == {"peft_type", "r", "target_modules"}


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "remove"])
def test_damage_is_found_before_it_is_served(tmp_path: Path, name: str, damage: str) -> None:
    digest = put(Blobs(tmp_path), 1)
    path = tmp_path / "blobs" / digest / name
    raw = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        at = raw.index(b'r": 4') + 4 if name == CONFIG_FILE else len(raw) - 1
        path.write_bytes({"flip": raw[:at] + b"5" + raw[at + 1 :], "cut": raw[:-1], "grow": raw + b"x"}[damage])
    blobs = Blobs(tmp_path)
    assert blobs.verified(digest) is None
    assert blobs.open(digest) is None
    assert digest not in blobs
    assert put(blobs, 1) == digest
    assert blobs.verified(digest) is not None


def test_leftovers_of_a_crash_go_but_downloads_stay(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    (blobs.staging("v") / WEIGHTS_FILE).write_bytes(b"half")
    (tmp_path / "trash" / "x").mkdir()
    (tmp_path / "blobs" / ("0" * 64)).mkdir()
    (tmp_path / "versions" / "torn").write_text("")
    again = Blobs(tmp_path)
    assert len(again) == 0
    assert (again.staging("v") / WEIGHTS_FILE).read_bytes() == b"half"
    assert not list((tmp_path / "trash").iterdir())
    assert not list((tmp_path / "versions").iterdir())


def test_downloads_that_nobody_resumes_go_while_the_store_runs(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    old = time.time() - STALE_STAGING_S - 1
    for version in ("abandoned", "resumed", "new"):
        (blobs.staging(version) / WEIGHTS_FILE).write_bytes(b"half")
        if version != "new":
            os.utime(blobs.staging(version), (old, old))
    resumed = blobs.staging("resumed")
    blobs.sweep()
    assert set((tmp_path / "staging").iterdir()) == {resumed, blobs.staging("new")}
    assert (resumed / WEIGHTS_FILE).read_bytes() == b"half"


def test_the_least_recently_used_leave_first(tmp_path: Path) -> None:
    one = Blobs(tmp_path / "size")
    put(one, 0)
    blobs = Blobs(tmp_path / "b", quota_bytes=3 * one.num_bytes + 50)
    digests = [put(blobs, seed) for seed in range(3)]
    assert blobs.verified(digests[0]) is not None, "used again: now the second is the oldest"
    fourth = put(blobs, 3)
    assert [digest in blobs for digest in [*digests, fourth]] == [True, False, True, True]
    assert blobs.digest_of("version-1") is None
    assert blobs.num_bytes <= 3 * one.num_bytes + 50
    with pytest.raises(Unavailable, match="may use"):
        put(Blobs(tmp_path / "c", quota_bytes=100), 1)


def test_what_has_no_room_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="may use 100"):
        Blobs(tmp_path / "a", quota_bytes=100).room(101, 101, tmp_path)
    blobs = Blobs(tmp_path / "b", reserve=Reserve(1000, lambda place: 1500))
    folder = blobs.staging("v")
    with blobs.room(100, 300, folder), pytest.raises(NoRoom, match="300 reserved"), blobs.room(1, 201, folder):
        pass
    (folder / WEIGHTS_FILE).write_bytes(bytes(200))
    with blobs.room(100, 700, folder), pytest.raises(NoRoom), blobs.room(1, 201, folder):
        pass  # files left by an earlier fetch count as present


def test_a_blob_removed_by_hand_is_the_first_to_leave(tmp_path: Path) -> None:
    one = Blobs(tmp_path / "size")
    put(one, 1)
    blobs = Blobs(tmp_path / "b", quota_bytes=3 * one.num_bytes + 50)
    first, gone, last = (put(blobs, seed) for seed in range(3))
    shutil.rmtree(tmp_path / "b" / "blobs" / gone)
    new = put(blobs, 3)
    assert [digest in blobs for digest in (first, gone, last, new)] == [True, False, True, True]
    assert blobs.num_bytes == 3 * one.num_bytes


def test_who_has_read_a_version_is_noted_with_it(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    digest = put(blobs, 1)
    assert blobs.readers_of("version-1") == set()
    for reader in ("anyone", "fleet", "anyone"):
        blobs.note_reader("version-1", reader)
        blobs.note_reader("version-2", reader)
    again = Blobs(tmp_path)
    assert again.digest_of("version-1") == digest
    assert again.readers_of("version-1") == {"anyone", "fleet"}
    assert again.readers_of("version-2") == set(), "nothing is here of it"
    again.note_version("version-1", "0" * 64)
    assert again.readers_of("version-1") == set(), "of other content"


def test_readers_keep_what_they_opened(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    digest = put(blobs, 1)
    folder = blobs.verified(digest)
    assert folder is not None
    with (folder / WEIGHTS_FILE).open("rb") as file:
        assert blobs.drop(digest) > 0
        assert blobs.verified(digest) is None
        assert len(file.read()) > 0
    assert blobs.drop(digest) == 0


def test_refuses_a_folder_that_is_no_adapter(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "x")
    (folder / WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(AdapterRefused, match="too short"):
        AdapterFolder.open(folder)


def test_notes_of_a_version_that_threads_write_at_once_all_stay(tmp_path: Path) -> None:
    """Takes by many tenants record their access, and others the version, each in its own thread."""
    blobs = Blobs(tmp_path)
    readers = {f"reader-{number}" for number in range(8)}
    with ThreadPoolExecutor(len(readers) + 1) as threads:
        for number in range(40):
            version = f"version-{number}"
            blobs.note_version(version, "d")
            noted = [threads.submit(blobs.note_reader, version, reader) for reader in readers]
            noted.append(threads.submit(blobs.note_version, version, "d", "two"))
            for one in noted:
                one.result()
            assert (blobs.readers_of(version), blobs.named_base(version)) == (readers, "two")
