"""Folders and secrets that others could read get private permissions, and those of other users are reported."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import pytest

from protocol.runtime.fleet_secret import read_or_make
from protocol.runtime.private_files import claimed_folder, close_to_others, is_own, own_folder, private_folder
from protocol.wire.errors import Internal


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_folder_is_private_and_an_old_one_is_closed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert mode_of(private_folder(tmp_path / "new")) == 0o700
    old = tmp_path / "old"
    old.mkdir()
    old.chmod(0o755)
    with caplog.at_level(logging.WARNING):
        assert mode_of(private_folder(old)) == 0o700
    assert "was accessible to other users (mode 755): removed their access" in caplog.text
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


def test_a_folder_where_everybody_may_write_is_claimed_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user may have put a link to one of this user's folders there; that folder must not be changed either."""
    assert mode_of(claimed_folder(tmp_path / "a" / "new")) == 0o700
    mine = tmp_path / "mine"
    mine.mkdir()
    mine.chmod(0o755)
    (tmp_path / "link").symlink_to(mine)
    with pytest.raises(Internal, match="link is not a folder, or belongs to another user"):
        claimed_folder(tmp_path / "link")
    assert mode_of(mine) == 0o755
    with monkeypatch.context() as patched:
        patched.setattr("os.geteuid", lambda: 1_000_000)
        with pytest.raises(Internal, match="another user"):
            claimed_folder(mine)
    assert mode_of(mine) == 0o755
    assert mode_of(claimed_folder(mine)) == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(Internal, match="is not a folder"):
        claimed_folder(tmp_path / "file")


def test_a_secret_that_others_could_read_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("a secret of long ago")
    path.chmod(0o644)
    assert read_or_make(path) == "a secret of long ago"
    assert mode_of(path) == 0o600
    assert close_to_others(path)


def test_a_cache_that_others_may_write_is_closed_or_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code is loaded from a cache, so no other user may have written to it or replaced anything in it."""
    assert own_folder(tmp_path / "a" / "new") == tmp_path / "a" / "new"
    assert mode_of(tmp_path / "a" / "new") == 0o700
    mine = tmp_path / "mine"
    mine.mkdir()
    mine.chmod(0o777)
    assert own_folder(mine) == mine
    assert mode_of(mine) == 0o755
    assert "writable by other users" in caplog.text
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "roots").mkdir(mode=0o755)
    monkeypatch.setattr("os.geteuid", lambda: 1_000_000)  # both belong to root, or to the user who runs this test
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = own_folder(tmp_path / "shared")
    assert own == tmp_path / "shared" / "own-1000000"
    assert mode_of(own) == 0o700
    assert own_folder(tmp_path / "shared") == own
    own.chmod(0o777)  # as if another user had created it
    left = own_folder(tmp_path / "shared")
    assert left.parent == tmp_path
    assert mode_of(left) == 0o700
    assert own_folder(tmp_path / "shared") == left


def test_a_file_that_others_may_have_written_is_not_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    assert not is_own(file)
    file.write_bytes(b"1")
    file.chmod(0o644)
    assert is_own(file)
    (tmp_path / "link").symlink_to(file)
    assert not is_own(tmp_path / "link")
    for mode in (0o664, 0o646, 0o666):
        file.chmod(mode)
        assert not is_own(file)
    file.chmod(0o600)
    owner = file.stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    assert is_own(file) == (owner == 0)  # root may do everything anyway
