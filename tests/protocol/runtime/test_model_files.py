"""The cache of folders that are made of models once."""

import os
from pathlib import Path

from protocol.runtime.model_files import hold_folder, prune_folders


def test_the_least_recently_touched_folders_go(tmp_path: Path) -> None:
    """But not one that a running fleet holds, nor what is still being made."""
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
