"""Model folders: the cache of folders converted once, and which models are on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.runtime.model_files import hold_folder, is_here, prune_folders


def test_the_least_recently_touched_folders_go(tmp_path: Path) -> None:
    """Except those that a running fleet holds, and those still being made."""
    for i in range(6):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "config.json").touch()
        os.utime(tmp_path / str(i), (i, i))
    (tmp_path / "scratch" / "made").mkdir(parents=True)
    os.utime(tmp_path / "0", (9, 9))
    held = hold_folder(tmp_path / "1")
    prune_folders(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "5", "1", "scratch"}
    os.close(held)
    prune_folders(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "5", "scratch"}


def test_a_model_is_here_once_a_worker_needs_no_download(tmp_path: Path) -> None:
    assert not is_here(str(tmp_path / "absent"))
    assert not is_here(str(tmp_path)), "a folder without a config is no model"
    (tmp_path / "config.json").write_text("{}")
    assert is_here(str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert not is_here(str(tmp_path / "model.gguf")), "nobody has prepared it on this machine"


def test_a_path_that_cannot_be_looked_at_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is too long, or this process has no access to the parent folder."""
    assert not is_here("/tmp/" + "x" * 300)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    assert not is_here("/root/models/base")
    assert not is_here("/root/models/base.gguf")


def test_a_model_of_the_hub_is_here_with_its_weights(tmp_path: Path) -> None:
    """Gateways of the same machine may have downloaded only its text files."""
    folder = tmp_path / "hub/models--org--x"
    snapshot = folder / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    (snapshot / "config.json").write_text("{}")

    def found() -> str:
        program = "from protocol.runtime.model_files import is_here; print([is_here(f'org/{x}') for x in 'xy'])"
        env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
        return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True).stdout.strip()

    assert found() == "[False, False]"
    (snapshot / "model.safetensors").write_bytes(b"")
    assert found() == "[True, False]"
