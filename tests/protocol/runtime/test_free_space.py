"""The free-space reserve of a disk stays free, whoever requests space, and however many requests there are at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.runtime.free_space import Reserve, free_bytes, size_of
from protocol.wire.errors import NoRoom


class Disk:
    """A disk with `free` bytes."""

    def __init__(self, free: int) -> None:
        self.free = free

    def __call__(self, place: Path) -> int:
        assert place.exists()
        return self.free


def test_a_refusal_tells_what_is_free_and_what_is_kept(tmp_path: Path) -> None:
    reserve = Reserve(100, Disk(150))
    reserve.check(tmp_path / "not" / "there" / "yet", 50)
    with pytest.raises(NoRoom, match="51 bytes do not fit: the disk has 150 free, and 100 are kept free") as refused:
        reserve.check(tmp_path, 51)
    assert (refused.value.status, refused.value.code) == (507, "no_room")


def test_promised_room_is_given_to_nobody_else(tmp_path: Path) -> None:
    reserve = Reserve(100, Disk(200))
    with reserve.room(tmp_path, lambda: 60):
        with pytest.raises(NoRoom, match="60 reserved for others"), reserve.room(tmp_path, lambda: 41):
            pass
        with reserve.room(tmp_path, lambda: 40), pytest.raises(NoRoom), reserve.room(tmp_path, lambda: 1):
            pass
    with pytest.raises(RuntimeError), reserve.room(tmp_path, lambda: 100):
        raise RuntimeError  # a failed request releases its space too
    with reserve.room(tmp_path, lambda: 100):
        pass


def test_what_is_written_of_a_promise_is_not_counted_twice(tmp_path: Path) -> None:
    disk, file = Disk(200), tmp_path / "folder" / "file"
    reserve = Reserve(100, disk)
    with reserve.room(tmp_path, lambda: 60 - size_of(tmp_path / "folder")):
        file.parent.mkdir()
        file.write_bytes(bytes(50))
        disk.free -= 50
        with reserve.room(tmp_path, lambda: 40):
            pass
        with pytest.raises(NoRoom, match="10 reserved"), reserve.room(tmp_path, lambda: 41):
            pass


def test_a_real_disk_is_asked(tmp_path: Path) -> None:
    free = free_bytes(tmp_path)
    assert free > 0
    Reserve(0).check(tmp_path, 1)
    with pytest.raises(NoRoom):
        Reserve(1 << 62).check(tmp_path)
