"""Folders and secrets that others could read are closed, and what is another user's is told."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import pytest

from protocol.runtime.fleet_secret import read_or_make
from protocol.runtime.private_files import close_to_others, private_folder


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_folder_is_private_and_an_old_one_is_closed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert mode_of(private_folder(tmp_path / "new")) == 0o700
    old = tmp_path / "old"
    old.mkdir()
    old.chmod(0o755)
    with caplog.at_level(logging.WARNING):
        assert mode_of(private_folder(old)) == 0o700
    assert "was open to other users (mode 755): closed it" in caplog.text
    caplog.clear()
    private_folder(old)
    assert not caplog.records


def test_a_folder_of_another_user_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.setattr("os.geteuid", lambda: 1_000_000)
    with caplog.at_level(logging.WARNING):
        private_folder(tmp_path)
    assert "belongs to one of them" in caplog.text
    assert mode_of(tmp_path) == 0o755


def test_a_secret_that_others_could_read_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("a secret of long ago")
    path.chmod(0o644)
    assert read_or_make(path) == "a secret of long ago"
    assert mode_of(path) == 0o600
    assert close_to_others(path)
