"""Workers that see the same GPUs claim one each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpu_worker.cuda.claim import claim_gpu
from protocol.wire.errors import Conflict

HOLD = """
import sys
from pathlib import Path
from gpu_worker.cuda.claim import claim_gpu
print(claim_gpu(["0", "1", "GPU-a/b"], Path(sys.argv[1]), {}), flush=True)
sys.stdin.read()
"""


def test_each_worker_takes_another_and_gives_it_back_when_it_ends(tmp_path: Path) -> None:
    folder, environment = tmp_path / "locks", dict[str, str]()
    others = [
        subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        taken = {other.stdout.readline().strip() for other in others if other.stdout is not None}
        assert taken == {"0", "1"}
        with pytest.raises(Conflict, match=r"\(0, 1\) are in use"):
            claim_gpu(["0", "1"], folder, environment)
        assert environment == {}
        assert claim_gpu(["0", "1", "GPU-a/b"], folder, environment) == "GPU-a/b"
        assert environment == {"CUDA_VISIBLE_DEVICES": "GPU-a/b"}
    finally:
        for other in others:
            other.communicate("")
    assert claim_gpu(["0", "1"], folder, environment) == "0"
