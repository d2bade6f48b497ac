"""Tables show values literally, without markup or emoji."""

from __future__ import annotations

import pytest

from lorafleet.shared.tables import print_list


def test_values_are_neither_markup_nor_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    values = ["team:key:1", "[bold]x[/]", "y" * 300]
    print_list(("a", "b", "c"), [values], "nothing")
    assert capsys.readouterr().out.splitlines()[1].split() == values
    print_list(("a",), [], "nothing")
    assert capsys.readouterr().out == "nothing\n"
