"""The runner of `make tour` distinguishes passed, failed and not installable, whatever a tour's script does."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from examples.tours.__main__ import HERE, Result, table, tour
from examples.tours.environments import NotInstallableError, install
from examples.tours.programs import PROGRAMS, Program

CHECKS = """
import sys
sys.path.insert(0, {folder!r})
from checks import Tour, raises, same
tour = Tour()
with tour.check("the key comes by the environment"):
    same((tour.url, tour.adapter, tour.key), ("http://fleet", "pirate", "secret"))
with tour.check("what is expected, raised"), raises(ValueError, "wrong"):
    raise ValueError("wrong")
{more}
tour.end()
"""


def installed(folder: Path) -> None:
    """Make `folder` an environment without packages that `install` accepts as complete."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / "installed.txt").write_text("pip")


def run(tmp_path: Path, script: str) -> Result:
    path = tmp_path / "script.py"
    path.write_text(script)
    installed(tmp_path / "environment")
    variables = {**os.environ, "URL": "http://fleet/", "ADAPTER": "pirate", "KEY": "secret"}
    return tour(Program("program", str(path), ("pip",)), tmp_path / "environment", variables)


def test_a_program_whose_checks_hold_has_passed(tmp_path: Path) -> None:
    result = run(tmp_path, CHECKS.format(folder=str(HERE), more=""))
    assert (result.word, result.failed) == ("passed", [])
    assert result.passed == ["the key comes by the environment", "what is expected, raised"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("same(1, 2)", "AssertionError: 1 is not 2"),
        ("raise OSError('no answer')", "OSError: no answer"),
        ("with raises(ValueError): pass", "AssertionError: ValueError was expected"),
    ],
)
def test_a_check_that_fails_is_named_with_its_reason(tmp_path: Path, body: str, reason: str) -> None:
    more = f"with tour.check('this one'):\n    {body}\nwith tour.check('the next one'):\n    pass"
    result = run(tmp_path, CHECKS.format(folder=str(HERE), more=more))
    assert result.word == "failed"
    assert result.failed == [f"this one: {reason}"]
    assert "the next one" in result.passed


def test_a_script_that_dies_has_failed(tmp_path: Path) -> None:
    result = run(tmp_path, "print('[ok] one')\nimport no_such_module")
    assert result.word == "failed"
    assert "No module named 'no_such_module'" in result.failed[0]


def test_a_script_that_checks_nothing_has_not_passed(tmp_path: Path) -> None:
    assert run(tmp_path, "").word == "failed"


def test_what_cannot_be_installed_has_not_passed(tmp_path: Path) -> None:
    program = Program("program", "script.py", ("./nothing-lies-here",))
    with pytest.raises(NotInstallableError, match="nothing-lies-here"):
        install(program, tmp_path / "environment")
    result = tour(program, tmp_path / "environment", {})
    assert result.word == "not installable"
    assert "| program |  | not installable |  | " in table([result])


def test_every_program_has_its_script_and_every_script_its_program() -> None:
    scripts = {
        path.relative_to(HERE).as_posix() for room in ("sdks", "js", "tools") for path in (HERE / room).iterdir()
    }
    wanted = {program.script for program in PROGRAMS}
    assert wanted <= scripts
    assert {script for script in scripts if script.endswith(("_tour.py", ".mjs"))} - wanted == {"js/checks.mjs"}
    names = [program.name for program in PROGRAMS]
    assert len(names) == len({*names})
