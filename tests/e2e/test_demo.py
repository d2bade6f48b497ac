"""`lorafleet demo` calls all models at once, shows each answer, and ends cleanly on request."""

import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

from helpers.factories import make_adapter, make_tiny_model
from helpers.fleets import MARKER, QUICK
from helpers.processes import with_variable


def test_the_demo_shows_every_answer_and_that_they_shared_steps(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny", max_len=2048)
    for seed, name in enumerate(("pirate", "json", "haiku"), start=1):
        make_adapter(tmp_path / "adapters" / name, model, seed=seed, rank=4 * seed)
    marker = secrets.token_hex(8)
    command = [sys.executable, "-m", "lorafleet", "demo", "--once", "--model", str(model), *QUICK]
    command += ["--adapters", str(tmp_path / "adapters"), "--data", str(tmp_path / "data"), "--port", "0"]
    command += ["--tokens", "800"]  # enough that even on a busy machine no answer ends before the last one begins
    environment = {**os.environ, MARKER: marker, "COLUMNS": "100"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    for title in (" tiny ", " pirate ", " json ", " haiku "):
        assert title in done.stdout
    found = re.search(r"(\d+) of (\d+) engine steps generated a token for all 4 models", done.stdout)
    assert found, done.stdout
    num_shared, num_steps = int(found[1]), int(found[2])
    assert 0 < num_shared <= num_steps
    assert not with_variable(MARKER, marker)
