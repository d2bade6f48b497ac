"""The script that proves the fleet on a GPU, on a machine without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "gpu-proof.sh"


@pytest.mark.thorough
def test_without_a_device_nothing_passes_for_proven(tmp_path: Path) -> None:
    """Without the check every test would be skipped, which pytest counts as a success."""
    env = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "WHEELS": ""}
    done = subprocess.run([SCRIPT, "tests"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "finds no CUDA device; nothing was run" in done.stderr
    assert not (tmp_path / "tests.log").exists()
