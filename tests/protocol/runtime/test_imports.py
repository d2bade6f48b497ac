"""Modules that are imported late or in parts are the same as imported normally."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from protocol.runtime.imports import Late, import_within, without


def test_a_late_module_is_imported_when_something_is_asked_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late_example.py").write_text("number = 7")
    monkeypatch.syspath_prepend(tmp_path)
    module = Late("late_example")
    assert "late_example" not in sys.modules
    assert module.number == 7
    assert sys.modules["late_example"].number == 7
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing


def test_a_package_is_missing_within_the_block_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "missing_example.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with without("missing_example"), pytest.raises(ImportError):
        __import__("missing_example")
    assert __import__("missing_example").__name__ == "missing_example"
    with without("missing_example"):
        assert __import__("missing_example") is sys.modules["missing_example"], "it is there already"


def test_a_module_comes_without_what_its_package_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package_example"
    package.mkdir()
    (package / "__init__.py").write_text("all_of_it = True")
    (package / "other.py").write_text("number = 1")
    (package / "part.py").write_text("from .other import number")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_within("package_example", "part").number == 1
    assert "package_example" not in sys.modules
    assert __import__("package_example").all_of_it
    with pytest.raises(ImportError):
        import_within("package_example", "none")
    with pytest.raises(ImportError):
        import_within("no_package_example", "none")
