"""Shell completion scripts, generated from the parsers, complete commands and flags."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lorafleet.__main__ import main


def test_shells_complete_every_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        text = capsys.readouterr().out
        for word in ("adapters", "preload", "workers", "doctor"):
            assert word in text
        if shell == "bash" or shutil.which(shell):
            (tmp_path / shell).write_text(text)
    asked = (
        f". {tmp_path}/bash; COMP_WORDS=(lorafleet adapters p); COMP_CWORD=2; _shtab_lorafleet; echo ${{COMPREPLY[*]}};"
        "COMP_WORDS=(lorafleet workers drain --w); COMP_CWORD=3; _shtab_lorafleet; echo ${COMPREPLY[*]}"
    )
    ran = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True, timeout=30)
    assert ran.stdout.split() == ["pin", "preload", "--wait"]
    if shutil.which("fish"):
        subprocess.run(["fish", "--no-execute", str(tmp_path / "fish")], check=True, timeout=30)
