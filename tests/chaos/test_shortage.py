"""The faults of resources do what they say, and nothing else."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from chaos.shortage import no_files


def test_files_that_are_away_are_never_reported_as_absent(tmp_path: Path) -> None:
    """A reader would take "absent" for "deleted", which no client may see of a stored file."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a").write_bytes(b"1")
    seen: set[object] = set()
    has_ended = threading.Event()

    def read() -> None:
        while not has_ended.is_set():
            try:
                seen.add((folder / "a").read_bytes())
            except OSError as error:
                seen.add(type(error))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(2000):
        with no_files(folder):
            pass
    has_ended.set()
    reader.join()
    assert seen <= {b"1", NotADirectoryError}
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_files_that_are_away_can_be_neither_read_nor_written(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    with no_files(folder):
        with pytest.raises(NotADirectoryError):
            (folder / "a").write_bytes(b"1")
        with pytest.raises(NotADirectoryError):
            (folder / "a").read_bytes()
    (folder / "a").write_bytes(b"1")
